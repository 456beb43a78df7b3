"""What models of all kinds do in a forward: captured, or refused with a reason."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ilm_compile.errors import TraceError
from ilm_compile.program.check import check_structure
from ilm_compile.program.trace import trace
from tests.program.execute import FEATURES, Apply, trace_and_compare


def no_grad_beside_in_place(model, x):
    with torch.no_grad():
        chosen = (x * 2).topk(2, -1).indices
        weight = x.exp()
    y = x * weight
    y += 1
    return y.gather(-1, chosen)


def cast_under_no_grad(model, x):
    """The cast returns x itself, whose gradient is not lost."""
    with torch.no_grad():
        same = x.to(x.dtype)
        factor = same.mean()
    y = same * factor
    y += 1
    return y * y


def empty_beside_values(model, x):
    return torch.cat([torch.empty(0, device=x.device, dtype=x.dtype), x, x], 0)


def asserted_value(model, x):
    longest = torch.arange(4, device=x.device).max().item()
    torch._check(longest <= 4)
    return x * 2


def loop_over_sizes(model, x):
    for row in torch.arange(2, device=x.device).tolist():
        x = x[row:]
    return x


CAPTURED = {
    "a loop over values that sizes decide": loop_over_sizes,
    "no_grad beside in-place ops": no_grad_beside_in_place,
    "a cast to the same dtype under no_grad": cast_under_no_grad,
    "an empty vector among values": empty_beside_values,
    "a value that is only asserted": asserted_value,
    "broadcast_tensors": lambda m, x: torch.mul(*torch.broadcast_tensors(x[:, :1], m.scale)),
    "a distribution": lambda m, x: x * torch.distributions.Normal(0.0, 2.0).icdf(x.sigmoid()),
    "std": lambda m, x: x.std(-1, keepdim=True, unbiased=False) * x,
}


@pytest.mark.parametrize("function", CAPTURED.values(), ids=CAPTURED)
def test_captured(function):
    model = Apply(function)
    check_structure(trace_and_compare(model, model.example_inputs()))


def loop_over_values(model, x):
    for row in x.argmax(-1).tolist():
        x = x[row:]
    return x


def changed_weight(model, x):
    model.scale.data.clamp_(-1, 1)
    return x * model.scale


REFUSED = {
    "random numbers": (lambda m, x: x + torch.rand_like(x), "draws random numbers with aten.rand"),
    "random in place": (
        lambda m, x: x + torch.empty_like(x).uniform_(),
        "random numbers with aten",
    ),
    "a loop over values": (loop_over_values, "reads a number out of a tensor|data-dependent"),
    "a shape that depends on values": (lambda m, x: x[x > 0], "reads a number out of a tensor"),
    "a weight that is changed": (changed_weight, "changes the .data of a value .*clamp_"),
    "as many classes as values": (lambda m, x: F.one_hot(x.argmax(-1)), "data-dependent|out of a"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_a_reason(function, reason):
    with pytest.raises(TraceError, match=reason):
        trace(Apply(function))


def test_what_is_cut_off_by_no_grad_has_no_gradient():
    model = Apply(no_grad_beside_in_place)
    program = trace(model)
    cut = [node for node in program.calls() if node.target is torch.ops.aten.detach.default]
    assert [tuple(node.meta["val"].shape) for node in cut] == [(4, FEATURES), (4, 2)]
