"""Every row of the transition table, executed: the value keeps its meaning, backward is the
transpose of forward."""

import pytest
import torch
from torch import Tensor

from ilm_compile.errors import PlacementError
from ilm_compile.program.collectives import TRANSITIONS, redistribute
from ilm_compile.program.communicator import ShapeCommunicator, communicators
from ilm_compile.program.placement import I, P, Placement, R, S
from ilm_compile.proof.threads import run_ranks
from tests.sharding.proof import gather, gradient_placement, scatter

SHAPE = (8, 12, 4)
KINDS = {
    "I": [I],
    "R": [R],
    "P": [P],
    "S": [S(0), S(1), S(2), S(1, (4, 8)), S(0, (4, 4)), S(0, folded=True)],
}
PAIRS = [
    pytest.param(src, dst, size, id=f"{src} to {dst} over {size}")
    for src_kind, dst_kind in TRANSITIONS
    for src in KINDS[src_kind]
    for dst in KINDS[dst_kind]
    for size in (2, 4)
    if src != dst
]
Moved = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def move(src: Placement, dst: Placement, size: int, full: Tensor, full_grad: Tensor) -> Moved:
    """Per rank: the value before and after, the gradient after and before."""
    values = scatter(full, src, size)
    grads = scatter(full_grad, gradient_placement(dst), size)

    def rank(r: int) -> tuple[Tensor, Tensor]:
        x = values[r].clone().requires_grad_()
        y = redistribute(x, str(src), str(dst), "tp")
        y.backward(grads[r].clone())
        assert x.grad is not None
        return y.detach(), x.grad

    after, before = zip(*run_ranks(size, rank), strict=True)
    return values, list(after), grads, list(before)


def inner(parts: list[Tensor], grads: list[Tensor], placement: Placement) -> Tensor:
    """The inner product of a value with a gradient over all ranks; an invariant counts once."""
    products = [(part * grad).sum() for part, grad in zip(parts, grads, strict=True)]
    return products[0] if placement == I else torch.stack(products).sum()


def samples() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)


@pytest.mark.parametrize(("src", "dst", "size"), PAIRS)
def test_value_is_unchanged(src: Placement, dst: Placement, size: int) -> None:
    full, full_grad = samples()
    _, after, _, _ = move(src, dst, size, full, full_grad)
    for value in gather(after, dst):
        torch.testing.assert_close(value, full, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("src", "dst", "size"), PAIRS)
def test_gradient_is_unchanged(src: Placement, dst: Placement, size: int) -> None:
    full, full_grad = samples()
    _, _, _, before = move(src, dst, size, full, full_grad)
    for gradient in gather(before, gradient_placement(src)):
        torch.testing.assert_close(gradient, full_grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("src", "dst", "size"), PAIRS)
def test_backward_is_the_transpose_of_forward(src: Placement, dst: Placement, size: int) -> None:
    values, after, grads, before = move(src, dst, size, *samples())
    forward, backward = inner(after, grads, dst), inner(values, before, src)
    torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("src", "dst", "size"), PAIRS)
def test_shapes_alone_follow_without_any_rank(src: Placement, dst: Placement, size: int) -> None:
    x = torch.empty(src.local_shape(SHAPE, size), device="meta")
    with communicators(tp=ShapeCommunicator(size)):
        y = redistribute(x, str(src), str(dst), "tp")
    assert y.shape == dst.local_shape(SHAPE, size)


@pytest.mark.parametrize(("src", "dst"), [("I", "I"), ("P", "P"), ("S(0)", "P"), ("R", "R")])
def test_pair_that_is_no_row_is_refused(src: str, dst: str) -> None:
    message = rf"no transition from {src.replace('(', '.').replace(')', '.')} to {dst} on axis 'tp'"
    with pytest.raises(PlacementError, match=message):
        run_ranks(2, lambda rank: redistribute(torch.ones(4), src, dst, "tp"))


def test_placement_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'Q'"):
        redistribute(torch.ones(4), "Q", "I", "tp")
