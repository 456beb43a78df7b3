"""A head and its cross entropy in one: torch's numbers, and no logits of all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ilm_compile.program import linear_loss
from ilm_compile.program.linear_loss import linear_cross_entropy, output_logits
from ilm_compile.program.reductions import MEAN, NONE, SUM

TOKENS, HIDDEN, CLASSES, IGNORED = 11, 6, 40, -100
NAMES = {NONE: "none", MEAN: "mean", SUM: "sum"}


def example(dtype: torch.dtype, weight: torch.dtype | None = None) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    w = torch.randn(CLASSES, HIDDEN, dtype=weight or dtype, requires_grad=True)
    target = torch.randint(0, CLASSES, (TOKENS,))
    target[[0, 5]] = IGNORED
    return x, w, target


@pytest.mark.parametrize("chunk", [1, 3 * CLASSES, 2**27])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", NAMES, ids=NAMES.get)
def test_the_numbers_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, reduction: int, smoothing: float, chunk: int
) -> None:
    monkeypatch.setattr(linear_loss, "CHUNK", chunk)
    x, w, target = example(torch.float64)
    options: Any = {"reduction": NAMES[reduction], "label_smoothing": smoothing}
    plain = F.cross_entropy(F.linear(x, w), target, ignore_index=IGNORED, **options)
    ours = linear_cross_entropy(x, w, target, reduction, IGNORED, smoothing, "")
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    gradient = torch.rand_like(plain)
    for found, expected in zip(
        torch.autograd.grad(ours, (x, w), gradient),
        torch.autograd.grad(plain, (x, w), gradient),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_wider_weight_is_cast_and_its_gradient_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "CHUNK", CLASSES)
    x, w, target = example(torch.bfloat16, torch.float32)
    linear_cross_entropy(x, w, target, SUM, IGNORED, 0.0, "").backward()
    exact, weight = x.detach().double(), w.detach().bfloat16().double().requires_grad_()
    F.cross_entropy(F.linear(exact, weight), target, reduction="sum").backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    assert weight.grad is not None
    assert (w.grad - weight.grad).norm() < 0.01 * weight.grad.norm()
    assert not torch.equal(w.grad, w.grad.bfloat16().float())


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, w, target = example(torch.float64)
    linear_cross_entropy(x, w.detach(), target, SUM, IGNORED, 0.0, "").backward()
    assert x.grad is not None


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an op gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_no_value_has_all_tokens_and_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "CHUNK", 2 * CLASSES)
    x, w, target = example(torch.float32)
    with Largest() as largest:
        linear_cross_entropy(x, w, target, SUM, IGNORED, 0.0, "").backward()
    assert largest.numel == CLASSES * HIDDEN  # the weight and its gradient
    assert largest.numel < TOKENS * CLASSES


def test_one_number_a_token_is_saved_beside_the_inputs() -> None:
    x, w, target = example(torch.float32)
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        linear_cross_entropy(x, w, target, SUM, IGNORED, 0.0, "")
    inputs = {tensor.data_ptr() for tensor in (x, w, target)}
    own = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    # One logsumexp, and what masks ignored losses: a bool.
    assert sum(tensor.nbytes for tensor in own) == TOKENS * 4


def test_logits_that_nobody_wants_take_no_memory() -> None:
    x, w, _ = example(torch.float32)
    kept, placeholder = (output_logits(x, w, wanted) for wanted in (True, False))
    assert torch.equal(kept, F.linear(x, w))
    assert (placeholder.shape, placeholder.dtype) == (kept.shape, kept.dtype)
    assert placeholder.untyped_storage().nbytes() == 4
    assert not kept.requires_grad
