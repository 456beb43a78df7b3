"""A hand-written backward is accepted where it is the derivative of its forward, else refused."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import Function

from ilm_compile.errors import TraceError
from ilm_compile.program.trace import trace
from tests.program.execute import Apply, trace_and_compare


class Square(Function):
    """Its backward is its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Scaled(Function):
    """The same in torch's newer form, with a number and an index tensor among its arguments."""

    @staticmethod
    def forward(x, rows, factor):
        return x[rows] * factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.rows, ctx.factor = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx, grad):
        full = grad.new_zeros(ctx.shape).index_add(0, ctx.rows, grad * ctx.factor)
        return full, None, None


class StraightThrough(Function):
    """Rounds, but lets the gradient pass."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Fixed(Function):
    """Cannot be tried on a few numbers."""

    @staticmethod
    def forward(ctx, x):
        return x.reshape(4, 96)

    @staticmethod
    def backward(ctx, grad):
        return grad.reshape(4, 96)


def test_a_backward_that_is_the_derivative_is_captured():
    model = Apply(lambda m, x: Square.apply(x) + m.scale)
    trace_and_compare(model, model.example_inputs())


def test_functions_with_a_context_of_their_own_are_captured():
    model = Apply(lambda m, x: Scaled.apply(x, torch.arange(2, device=x.device), 3.0))
    trace_and_compare(model, model.example_inputs())


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (StraightThrough.apply, "StraightThrough .* is not the derivative of its forward"),
        (lambda x: Fixed.apply(x.repeat(1, 16)), "Fixed .* cannot be tried on random numbers"),
    ],
    ids=["straight-through", "cannot be tried"],
)
def test_another_backward_is_refused(function, reason):
    with pytest.raises(TraceError, match=reason):
        trace(Apply(lambda m, x: function(x) * m.scale.sum()))


def test_functions_are_not_checked_after_tracing():
    trace(Apply(lambda m, x: Square.apply(x)))
    x = torch.tensor(2.6, requires_grad=True)
    StraightThrough.apply(x).backward()
    assert x.grad == 1
