"""The vocabulary-parallel ends equal F.embedding and F.cross_entropy, values and gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.placement import S, join_shards, split_shards
from ilm_compile.program.reductions import MEAN, SUM
from ilm_compile.program.vocab import vocab_cross_entropy, vocab_embedding
from ilm_compile.proof.threads import run_ranks

VOCAB, HIDDEN, TOKENS = 12, 5, 9
NO_PADDING = -1  # ATen's encoding of padding_idx=None


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


def sharded_embedding(
    weight: Tensor, indices: Tensor, padding_idx: int, size: int, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of the ranks' parts, and the gradient of the whole weight."""
    shards = split_shards(weight, S(0), size)

    def rank(r: int) -> tuple[Tensor, Tensor]:
        local = shards[r].clone().requires_grad_()
        part = vocab_embedding(local, indices, padding_idx, "tp")
        part.backward(grad)
        assert local.grad is not None
        return part.detach(), local.grad

    parts, grads = zip(*run_ranks(size, rank), strict=True)
    return torch.stack(parts).sum(0), join_shards(grads, S(0))


@pytest.mark.parametrize("padding_idx", [NO_PADDING, 0, 4, 11])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_embedding(size: int, padding_idx: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 4, 11, 5], [4, 2, 7, 0]])
    expected = torch.ops.aten.embedding(weight, indices, padding_idx)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    value, weight_grad = sharded_embedding(weight.detach(), indices, padding_idx, size, grad)
    assert weight.grad is not None
    close(value, expected.detach())
    close(weight_grad, weight.grad)


def test_rows_of_other_ranks_are_zero() -> None:
    indices = torch.tensor([0, VOCAB - 1])
    shards = split_shards(torch.ones(VOCAB, HIDDEN), S(0), 2)
    parts = run_ranks(2, lambda rank: vocab_embedding(shards[rank], indices, NO_PADDING, "tp"))
    assert [part.sum(-1).tolist() for part in parts] == [[HIDDEN, 0], [0, HIDDEN]]


def sharded_loss(
    logits: Tensor, target: Tensor, size: int, reduction: int, ignore_index: int, smoothing: float
) -> tuple[list[Tensor], Tensor]:
    """The loss on every rank, and the gradient of the whole logits."""
    shards = split_shards(logits, S(1), size)

    def rank(r: int) -> tuple[Tensor, Tensor]:
        local = shards[r].clone().requires_grad_()
        loss = vocab_cross_entropy(local, target, reduction, ignore_index, smoothing, "tp")
        (3 * loss).backward()
        assert local.grad is not None
        return loss.detach(), local.grad

    losses, grads = zip(*run_ranks(size, rank), strict=True)
    return list(losses), join_shards(grads, S(1))


def check_loss(
    logits: Tensor,
    target: Tensor,
    *,
    size: int = 2,
    reduction: int = MEAN,
    ignore_index: int = -100,
    smoothing: float = 0.0,
) -> None:
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(
        whole,
        target,
        reduction={MEAN: "mean", SUM: "sum"}[reduction],
        ignore_index=ignore_index,
        label_smoothing=smoothing,
    )
    (3 * expected).backward()
    losses, gradient = sharded_loss(logits, target, size, reduction, ignore_index, smoothing)
    assert whole.grad is not None
    for loss in losses:
        close(loss, expected.detach())
    close(gradient, whole.grad)


def random_logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, VOCAB, dtype=dtype, generator=generator)
    return logits, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("reduction", [MEAN, SUM], ids=["mean", "sum"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_cross_entropy(size: int, reduction: int, ignore_index: int, smoothing: float) -> None:
    logits, target = random_logits()
    target[::4] = ignore_index
    check_loss(
        logits,
        target,
        size=size,
        reduction=reduction,
        ignore_index=ignore_index,
        smoothing=smoothing,
    )


@pytest.mark.parametrize("scale", [1e3, -1e3, 1e5])
def test_large_logits_do_not_overflow(scale: float) -> None:
    logits, target = random_logits()
    check_loss(logits * scale, target)
    losses, gradient = sharded_loss(logits * scale, target, 2, MEAN, -100, 0.0)
    assert torch.isfinite(losses[0])
    assert torch.isfinite(gradient).all()


def test_logits_that_are_large_on_one_rank_only() -> None:
    logits, target = random_logits()
    logits[:, VOCAB // 2 :] += 2000.0
    check_loss(logits, target)


@pytest.mark.parametrize("reduction", [MEAN, SUM], ids=["mean", "sum"])
def test_no_target_at_all_is_what_torch_makes_of_it(reduction: int) -> None:
    logits, target = random_logits()
    check_loss(logits, torch.full_like(target, -100), reduction=reduction)


def test_targets_of_one_rank_only() -> None:
    logits, target = random_logits()
    check_loss(logits, target % (VOCAB // 4), size=4)


def test_loss_keeps_the_dtype_of_the_logits() -> None:
    logits, target = random_logits(torch.float32)
    losses, gradient = sharded_loss(logits, target, 2, MEAN, -100, 0.1)
    assert (losses[0].dtype, gradient.dtype) == (torch.float32, torch.float32)


def test_backward_twice_gives_the_same_gradient() -> None:
    logits, target = random_logits()
    shards = split_shards(logits, S(1), 2)

    def rank(r: int) -> tuple[Tensor, Tensor]:
        local = shards[r].clone().requires_grad_()
        loss = vocab_cross_entropy(local, target, MEAN, -100, 0.1, "tp")
        (first,) = torch.autograd.grad(loss, local, retain_graph=True)
        (second,) = torch.autograd.grad(loss, local)
        return first, second

    for first, second in run_ranks(2, rank):
        assert torch.equal(first, second)


@pytest.mark.parametrize("target", [VOCAB, -1, 10**6])
@pytest.mark.parametrize("size", [1, 2])
def test_a_target_outside_the_vocabulary_raises_as_in_torch(target: int, size: int) -> None:
    logits, targets = random_logits()
    targets[3] = target
    with pytest.raises((IndexError, RuntimeError)):
        F.cross_entropy(logits, targets)
    with pytest.raises(IlmCompileError, match=rf"targets in \[0, 12\).*got {target} at token 3"):
        sharded_loss(logits, targets, size, MEAN, -100, 0.0)


def test_a_padded_class_as_target_makes_an_infinite_loss() -> None:
    logits, target = random_logits()
    logits[:, -2:] = -torch.inf  # as pad_vocabulary masks the classes it adds
    check_loss(logits, target % (VOCAB - 2), size=4)
    target[0] = VOCAB - 1
    losses, _ = sharded_loss(logits, target, 4, MEAN, -100, 0.0)
    assert all(loss == torch.inf for loss in losses)


def test_a_rank_of_padded_classes_alone() -> None:
    logits, target = random_logits()
    logits[:, VOCAB // 2 :] = -torch.inf
    check_loss(logits, target % (VOCAB // 2), size=2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_low_precision_logits_are_summed_in_float32(smoothing: float) -> None:
    logits, target = random_logits(torch.bfloat16)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, target, label_smoothing=smoothing)
    (3 * expected).backward()
    losses, gradient = sharded_loss(logits, target, 2, MEAN, -100, smoothing)
    assert (losses[0].dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    assert exact.grad is not None
    assert abs(losses[0].item() - expected.item()) <= 1e-6 * expected.item()
    assert (gradient - exact.grad).norm() <= 2**-8 * exact.grad.norm()


def test_the_backward_pass_keeps_the_logits_and_no_softmax() -> None:
    logits, target = random_logits(torch.bfloat16)
    kept: list[tuple[torch.dtype, int]] = []

    def note(x: Tensor) -> Tensor:
        kept.append((x.dtype, x.numel()))
        return x

    def rank(r: int) -> None:
        local = logits.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            vocab_cross_entropy(local, target, SUM, -100, 0.0, "tp")

    run_ranks(1, rank)
    assert sorted(kept, key=str) == [
        (torch.bfloat16, TOKENS * VOCAB),
        (torch.float32, TOKENS),
        (torch.int64, TOKENS),
    ]
