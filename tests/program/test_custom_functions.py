"""Autograd functions written by hand: their backward is what trains, or they are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

import ilm_compile
from ilm_compile.errors import TraceError
from ilm_compile.program.placement import R, S
from ilm_compile.program.trace import trace
from tests.program.execute import Apply, trace_and_compare
from tests.proof.small import INPUTS
from tests.support.layouts import placed


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
    """Rounds to multiples of a step, but lets the gradient pass."""

    @staticmethod
    def forward(ctx, x, step=1.0):
        return (x / step).round() * step

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Reversed(Function):
    """Gives what it is given, and the gradient with another sign and what was saved."""

    @staticmethod
    def forward(x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return -grad * x.tanh()


class Centred(Function):
    """Mixes a row in backward alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean(-1, keepdim=True)


class BoundedRoot(Function):
    """A square root, of positive numbers alone, whose gradient is bounded."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (4 * x).clamp(min=0.5).sqrt()


class Nowhere(Function):
    """Gives no number of an ordinary one."""

    @staticmethod
    def forward(ctx, x):
        return (x.abs() + 2).acos()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


class Auxiliary(Function):
    """Adds a loss unseen: its gradient is 1 whatever comes (DeepSeek-V2's router)."""

    @staticmethod
    def forward(ctx, x, loss):
        ctx.dtype, ctx.is_trained = loss.dtype, loss.requires_grad
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones((), dtype=ctx.dtype) if ctx.is_trained else None


class Fixed(Function):
    """Cannot be tried on a few numbers."""

    @staticmethod
    def forward(ctx, x):
        return x.reshape(4, 96)

    @staticmethod
    def backward(ctx, grad):
        return grad.reshape(4, 96)


class Clipped(Function):
    """Bounds a gradient, which depends on how the loss is scaled."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-0.1, 0.1)


class Noisy(Function):
    """Draws numbers."""

    @staticmethod
    def forward(ctx, x):
        return x + torch.rand_like(x)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Two(Function):
    """Has two results."""

    @staticmethod
    def forward(ctx, x):
        return x.clone(), x * 2

    @staticmethod
    def backward(ctx, first, second):
        return first


def penalty(x: Tensor) -> Tensor:
    """A loss of the rows of a layer."""
    return 0.1 * x.square().mean()


KEPT = {
    "derivative": lambda x: Square.apply(x),
    "other arguments": lambda x: Scaled.apply(x, torch.arange(2, device=x.device), 3.0),
    "straight-through": lambda x: StraightThrough.apply(x, 0.5) * x,
    "other steps": lambda x: StraightThrough.apply(x, 0.5) + StraightThrough.apply(x, 0.25),
    "reversed": lambda x: Reversed.apply(x) * x,
    "mixing": lambda x: Centred.apply(x) * x,
    "bounded root": lambda x: BoundedRoot.apply(x.abs()) * x,
    "auxiliary loss": lambda x: Auxiliary.apply(x, penalty(x)) * x,
}


@pytest.mark.parametrize("name", KEPT)
def test_the_backward_that_was_written_trains(name):
    model = Apply(lambda m, x: KEPT[name](x) * m.scale)
    trace_and_compare(model, model.example_inputs())


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: Fixed.apply(x.repeat(1, 16)), "Fixed .* cannot be tried on random numbers"),
        (Clipped.apply, r"Clipped .* is not linear in the gradient .*test_custom_functions.py"),
        (Noisy.apply, "Noisy .* draws random numbers"),
        (Nowhere.apply, "Nowhere .* gives no numbers"),
        (lambda x: Two.apply(x)[0], "Two .* has several results"),
    ],
    ids=["cannot be tried", "clipped", "noisy", "no numbers", "two results"],
)
def test_what_cannot_be_kept_is_refused(function, reason):
    with pytest.raises(TraceError, match=reason):
        trace(Apply(lambda m, x: function(x) * m.scale.sum()))


def test_functions_are_not_checked_after_tracing():
    trace(Apply(lambda m, x: Square.apply(x)))
    x = torch.tensor(2.6, requires_grad=True)
    StraightThrough.apply(x).backward()
    assert x.grad == 1


class Block(nn.Module):
    def __init__(self, act) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Model(nn.Module):
    """Two blocks with a function of the user's between their layers."""

    def __init__(self, act) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64, bias=False)
        self.layers = nn.ModuleList(Block(act) for _ in range(2))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("name", ["straight-through", "reversed", "mixing", "auxiliary loss"])
def test_a_plan_with_such_functions_is_proven(name):
    torch.manual_seed(0)
    report = ilm_compile.verify(
        Model(KEPT[name]), example_inputs=INPUTS, tp=2, pp=2, num_microbatches=2
    )
    report.raise_if_failed()


@pytest.mark.parametrize(("name", "placement"), [("straight-through", S(2)), ("mixing", R)])
def test_an_elementwise_function_stays_sharded_and_another_is_whole(name, placement):
    program = ilm_compile.partition(
        Model(KEPT[name]), example_inputs=INPUTS, tp=2, constraints={"layers.*.up.weight": "S(0)"}
    )
    found = [placed(n) for n in program.calls() if "ilm_user" in str(n.target)]
    assert found == [placement, placement]
