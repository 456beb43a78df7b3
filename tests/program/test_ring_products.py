"""Products beside a collective: what runs while a message is under way, and torch's own ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ilm_compile.program import symmetric_memory
from ilm_compile.program.communicator import ShapeCommunicator, communicators
from ilm_compile.program.ring_products import gather_products, product_scatter
from ilm_compile.runtime.communicator import ProcessGroupCommunicator, SingleCommunicator
from tests.support.world import World

SIZE = 3


class Logged(ShapeCommunicator):
    """Notes when a message is sent and when it is waited for."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.log: list[str] = []

    def shift(self, xs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        self.log.append("send")

        def wait() -> list[Tensor]:
            self.log.append("wait")
            return [torch.zeros_like(x) for x in xs]

        return wait


def noted(log: list[str], name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def product(*args: Tensor, **kwargs: Tensor) -> Tensor:
        log.append(name)
        return run(*args, **kwargs)

    return product


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (
            lambda x, w: gather_products(x, [w], [None], 0, "tp"),
            ["send", "mm", "wait", "send", "mm", "wait", "mm"],
        ),
        (
            lambda x, w: product_scatter(x, w, None, 0, "tp"),
            ["linear", "send", "linear", "wait", "send", "linear", "wait"],
        ),
    ],
    ids=["gather", "scatter"],
)
def test_a_piece_is_multiplied_while_the_next_is_under_way(
    run: Callable[[Tensor, Tensor], object], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = Logged()
    for owner, name in ((torch, "mm"), (torch.nn.functional, "linear")):
        monkeypatch.setattr(owner, name, noted(comm.log, name, getattr(owner, name)))
    with communicators(tp=comm):
        run(torch.randn(2 * SIZE, 4), torch.randn(4, 4))
    assert comm.log == expected


@pytest.mark.parametrize("dim", [0, 1])
def test_on_one_rank_they_are_linear_layers(dim: int) -> None:
    """Which the proof of their placements compares with."""
    torch.manual_seed(0)
    shapes = (2, 4, 6), (8, 6), (4, 6), (8,)
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    x, first, second, bias = leaves
    linear = torch.nn.functional.linear
    with communicators(tp=SingleCommunicator()):
        found = [
            *gather_products(x, [first, second], [bias, None], dim, "tp"),
            product_scatter(x, first, bias, dim, "tp"),
        ]
        ours = torch.autograd.grad([each.sin().sum() for each in found], leaves)
    expected = [linear(x, first, bias), linear(x, second), linear(x, first, bias)]
    theirs = torch.autograd.grad([each.sin().sum() for each in expected], leaves)
    for one, other in zip((*found, *ours), (*expected, *theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", symmetric_memory.SCHEMAS)
def test_torch_has_the_ops_over_symmetric_memory_as_they_are_called(name: str) -> None:
    from torch.distributed import _symmetric_memory  # noqa: F401 - defines them

    op = getattr(torch.ops.symm_mem, name).default
    assert str(op._schema) == symmetric_memory.SCHEMAS[name]


class Near(ProcessGroupCommunicator):
    """On the CPU, ranks that have what torch has in the place of symmetric memory."""

    def symmetric_group(self, x: Tensor) -> str:
        return self.group.group_name


def both_ways(rank: int, dim: int) -> list[tuple[Tensor, Tensor]]:
    """Results over symmetric memory, by what torch has for machines without it, and in a ring."""
    from torch.distributed import _symmetric_memory as torchs

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", torchs._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", torchs._fused_matmul_reduce_scatter_fallback, "CPU")
    torch.manual_seed(rank)
    x, weights, bias = torch.randn(2, 4, 6), [torch.randn(8, 6), torch.randn(4, 6)], torch.randn(8)
    more = [x, torch.randn(2, 4, 3)], [weights[0], torch.randn(8, 3)]
    comms, answers = [Near(dist.group.WORLD), ProcessGroupCommunicator(dist.group.WORLD)], []
    for comm in comms:
        with communicators(tp=comm):
            found = [*torch.ops.ilm.gather_products(x, weights, [bias, None], dim, "tp")]
            found.append(torch.ops.ilm.products_scatter(*more, bias, dim, "tp"))
            found.append(torch.ops.ilm.products_scatter([x], weights[:1], None, dim, "tp"))
        answers.append(found)
    library._destroy()
    assert comms[0].stats == comms[1].stats
    return list(zip(*answers, strict=True))


@pytest.mark.parametrize("dim", [0, 1])
def test_both_ways_give_the_same(dim: int, world2: World) -> None:
    for rank in world2.run(both_ways, dim):
        assert len(rank) == 5
        for found, expected in rank:
            torch.testing.assert_close(found, expected)
            assert found.is_contiguous()


def test_on_the_cpu_no_ranks_have_symmetric_memory() -> None:
    for comm in (ShapeCommunicator(2), SingleCommunicator()):
        assert symmetric_memory.near_ranks(comm, torch.ones(2)) is None
