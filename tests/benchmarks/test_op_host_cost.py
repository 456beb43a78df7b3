"""The host cost of an op is measured beside a plain op's."""

import pytest
import torch

from benchmarks import op_host_cost


def test_every_way_has_a_row_in_times_of_the_plain_op() -> None:
    rows = op_host_cost.measure(rounds=1, calls=3)
    assert [row.way for row in rows] == list(op_host_cost.WAYS)
    assert (rows[0].way, rows[0].forward_ratio, rows[0].both_ratio) == ("plain op", 1.0, 1.0)
    assert all(0 < row.forward_us < row.both_us for row in rows)


@pytest.mark.parametrize("way", ["autograd.Function", "register_autograd", "fused op"])
def test_all_but_the_plain_op_do_the_same(way: str) -> None:
    x, weight = (torch.randn(4, requires_grad=True) for _ in range(2))
    result = op_host_cost.WAYS[way](x, weight, *op_host_cost.OPTIONS)
    assert torch.equal(result, x)
    grads = torch.autograd.grad(result, (x, weight), torch.ones(4))
    assert torch.equal(grads[0], torch.ones(4))
    assert torch.equal(grads[1], weight)
