"""The ops of a sharded cross entropy, beside torch on the CPU and under Triton's interpreter."""

from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels import vocab_cross_entropy_backward, vocab_loss, vocab_statistics
from tests.kernels.accuracy import INTERPRETED, relative_error
from tests.kernels.worker import Worker

TOKENS, CLASSES, IGNORED = 7, 12, -100
LAUNCHERS = "ilm_compile.kernels.triton_vocab_loss"


def example(
    num_classes: int = CLASSES, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Logits of the second of three ranks, and targets anywhere, one of them ignored."""
    torch.manual_seed(0)
    logits = (torch.randn(TOKENS, num_classes, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(0, 3 * num_classes, (TOKENS,))
    target[:3] = torch.tensor([IGNORED, num_classes, 2 * num_classes - 1])
    return logits, target


@pytest.mark.parametrize("chunk", [1, 30, 2**22])
def test_statistics(monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(vocab_loss, "CHUNK", chunk)
    logits, target = example()
    top, exps, picked, total = vocab_statistics(logits, target, CLASSES, IGNORED, 3 * CLASSES)
    assert torch.equal(top, logits.amax(-1))
    torch.testing.assert_close(top + exps.log(), logits.logsumexp(-1))
    torch.testing.assert_close(total, logits.sum(-1))
    local = [t - CLASSES for t in target.tolist()]
    assert picked.tolist() == [
        row[c] if 0 <= c < CLASSES else 0 for row, c in zip(logits.tolist(), local, strict=True)
    ]


def losses(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 30, 2**22])
def test_gradient(monkeypatch, chunk: int, smoothing: float) -> None:
    monkeypatch.setattr(vocab_loss, "CHUNK", chunk)
    _, target = example()
    logits = torch.randn(TOKENS, 3 * CLASSES, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(TOKENS, dtype=torch.float64)
    losses(logits, target, smoothing).backward(grad)
    grad[0] = nan  # of an ignored token: it must not come through
    whole = logits.detach()
    for rank in range(3):
        part = slice(rank * CLASSES, (rank + 1) * CLASSES)
        found = vocab_cross_entropy_backward(
            *(whole[:, part], target, whole.logsumexp(-1), grad),
            *(part.start, IGNORED, smoothing, 3 * CLASSES),
        )
        assert found.is_contiguous()
        torch.testing.assert_close(found, logits.grad[:, part], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    logits, target = example(dtype=dtype)
    statistics = vocab_statistics(logits, target, CLASSES, IGNORED, 3 * CLASSES)
    assert {x.dtype for x in statistics} == {torch.float32}
    ones = torch.ones(TOKENS)
    args = target, ones, ones, CLASSES, IGNORED, 0.1, 3 * CLASSES
    found = vocab_cross_entropy_backward(logits, *args)
    assert found.dtype == dtype
    assert torch.equal(found, vocab_cross_entropy_backward(logits.float(), *args).to(dtype))


@pytest.mark.parametrize("op", ["vocab_statistics", "vocab_cross_entropy_backward"])
def test_opcheck(op: str) -> None:
    logits, target = example(dtype=torch.float32)
    args = {
        "vocab_statistics": (CLASSES, IGNORED, 3 * CLASSES),
        "vocab_cross_entropy_backward": (
            *(torch.ones(TOKENS), torch.ones(TOKENS)),
            *(CLASSES, IGNORED, 0.1, 3 * CLASSES),
        ),
    }
    torch.library.opcheck(getattr(torch.ops.ilm, op).default, (logits, target, *args[op]))


REFUSED = {
    "three dims": (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), "floating logits"),
    "integers": (torch.zeros(2, 3).int(), torch.zeros(2, dtype=torch.int64), "floating logits"),
    "probabilities": (torch.zeros(2, 3), torch.zeros(2), "target of int32 or int64"),
    "other tokens": (
        torch.zeros(2, 3),
        torch.zeros(3, dtype=torch.int64),
        r"each token; got .*\(3,",
    ),
}


@pytest.mark.parametrize(("logits", "target", "message"), REFUSED.values(), ids=list(REFUSED))
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_wrong_inputs(logits, target, message, device) -> None:
    with pytest.raises(IlmCompileError, match=message):
        vocab_statistics(logits.to(device), target.to(device), 0, IGNORED, 9)


@pytest.mark.parametrize("target", [-1, 3 * CLASSES])
def test_a_target_outside_the_vocabulary_raises(target: int) -> None:
    logits, targets = example()
    targets[4] = target
    with pytest.raises(IlmCompileError, match=rf"\[0, 36\), or -100 .*; got {target} at token 4"):
        vocab_statistics(logits, targets, CLASSES, IGNORED, 3 * CLASSES)


def compare(interpreter: Worker, op: str, logits: Tensor, target: Tensor, *args: Any) -> None:
    """Hold what the launcher of `ilm::op` gives in the interpreter to the reference."""
    found = interpreter.call(f"{LAUNCHERS}:{op}", logits, target, *args)
    expected = getattr(torch.ops.ilm, op)(logits, target, *args)
    if isinstance(found, Tensor):
        found, expected = (found,), (expected,)
    for mine, other in zip(found, expected, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert mine.is_contiguous()
        finite = other.isfinite()
        assert torch.equal(mine[~finite], other[~finite])
        assert (
            not finite.any()
            or relative_error(mine[finite], other[finite]) < (INTERPRETED[mine.dtype])
        )


def compare_both(
    interpreter: Worker, logits: Tensor, target: Tensor, smoothing: float = 0.1
) -> None:
    num_tokens, width = logits.shape
    compare(interpreter, "vocab_statistics", logits, target, width, IGNORED, 3 * width)
    logsumexp = logits.float().logsumexp(-1).nan_to_num(neginf=0.0) + 1
    args = logsumexp, torch.randn(num_tokens), width, IGNORED, smoothing, 3 * width
    compare(interpreter, "vocab_cross_entropy_backward", logits, target, *args)


@pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
@pytest.mark.parametrize("num_classes", [1, 128, 300, 5000])  # 5000: three steps of 2048
def test_kernels(interpreter, num_classes, dtype) -> None:
    compare_both(interpreter, *example(num_classes, dtype))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_kernels_on_masked_and_very_different_logits(interpreter, smoothing) -> None:
    logits, target = example(5000, torch.float32)
    logits[1, :2500] = -inf  # the first blocks of a row
    logits[2, 10:] = -inf  # the last ones
    logits[3] = -inf
    logits[4] += 1e4
    logits[5, ::7] -= 1e4
    compare_both(interpreter, logits, target, smoothing)


def test_kernels_on_strided_inputs(interpreter) -> None:
    logits, target = example(dtype=torch.float32)
    apart = target.repeat_interleave(2)[::2]
    for view in (torch.cat([logits, logits], 1)[:, :CLASSES], logits.T.contiguous().T):
        compare_both(interpreter, view, apart)
    grad = torch.tensor(2.0).expand(TOKENS)  # of a sum
    args = logits.logsumexp(-1), grad, CLASSES, IGNORED, 0.0, 3 * CLASSES
    compare(interpreter, "vocab_cross_entropy_backward", logits, target.int(), *args)


def test_kernels_on_no_tokens(interpreter) -> None:
    compare_both(interpreter, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))


def test_kernel_ignores_the_gradient_of_ignored_tokens(interpreter) -> None:
    logits, target = example(dtype=torch.float32)
    grad = torch.ones(TOKENS)
    grad[0] = nan
    args = logits.logsumexp(-1), grad, CLASSES, IGNORED, 0.1, 3 * CLASSES
    compare(interpreter, "vocab_cross_entropy_backward", logits, target, *args)


@pytest.mark.parametrize("unknown", [-1, 3 * CLASSES, 2**40])
def test_kernel_makes_nan_of_a_target_outside_the_vocabulary(interpreter, unknown) -> None:
    logits, target = example(dtype=torch.float32)
    target[4] = unknown
    args = logits, target, CLASSES, IGNORED, 3 * CLASSES
    _, exps, picked, _ = interpreter.call(f"{LAUNCHERS}:vocab_statistics", *args)
    assert exps.isnan().tolist() == [token == 4 for token in range(TOKENS)]
    assert picked[4] == 0
