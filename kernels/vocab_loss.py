"""The ops of a cross entropy whose vocabulary is sharded: what each rank computes on its own.

`ilm::vocab_statistics` reads this rank's logits once and leaves four numbers a token, from which
all-reduces make the loss; `ilm::vocab_cross_entropy_backward` reads them once more and writes their
gradient. Neither makes a full-precision copy of the logits, and between them only the logits and
one logsumexp a token need to be kept. `ilm_compile.program.vocab` does the collectives.

Shapes in this file: logits (N tokens, V classes that this rank holds, of `vocab` in all, beginning
at class `first`), target (N,).
"""

from collections.abc import Iterator
from math import inf

import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.library import exact_dtype, implement

# Logits that the reference holds in full precision at a time: 16 MiB in float32.
CHUNK = 2**22

torch.library.define(
    "ilm::vocab_statistics",
    "(Tensor logits, Tensor target, int first, int ignore_index, int vocab)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ilm::vocab_cross_entropy_backward",
    "(Tensor logits, Tensor target, Tensor logsumexp, Tensor grad, int first, int ignore_index,"
    " float label_smoothing, int vocab) -> Tensor",
)


def vocab_statistics(
    logits: Tensor, target: Tensor, first: int, ignore_index: int, vocab: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (max, sum_exp, picked, sum) of each token over this rank's classes, (N,) each.

    max: the largest logit; sum_exp: of exp(logit - max), 0 if all are minus infinity; picked: the
    logit of the target, 0 where this rank does not hold it or it is `ignore_index`; sum: of the
    logits. In float32, float64 for float64 logits. A target that is neither in [0, vocab) nor
    `ignore_index` raises IlmCompileError on the CPU, where torch raises too; on CUDA, where
    to look would be to wait for the device, its sum_exp is NaN, and so is every loss made of it.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor]
    result = torch.ops.ilm.vocab_statistics(logits, target, first, ignore_index, vocab)
    return result


def vocab_cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    first: int,
    ignore_index: int,
    label_smoothing: float,
    vocab: int,
) -> Tensor:
    """Return the gradient of this rank's logits, contiguous and in their dtype.

    logsumexp: (N,) over all classes of all ranks. grad: (N,) of the loss of each token, which is
    (1 - label_smoothing) (logsumexp - picked) + label_smoothing (logsumexp - mean of the logits).
    Class j of a token gets grad (exp(logit_j - logsumexp) - (1 - label_smoothing) [j = target]
    - label_smoothing / vocab); a token whose target is `ignore_index` gets 0, whatever its grad.
    """
    result: Tensor = torch.ops.ilm.vocab_cross_entropy_backward(
        *(logits, target, logsumexp, grad, first, ignore_index, label_smoothing, vocab)
    )
    return result


def _check(op: str, logits: Tensor, target: Tensor, *per_token: Tensor) -> None:
    given = f"logits {tuple(logits.shape)} {logits.dtype}, target {tuple(target.shape)}"
    given += f" {target.dtype}" + "".join(f", {tuple(x.shape)}" for x in per_token)
    if logits.dim() != 2 or not logits.is_floating_point():
        raise IlmCompileError(f"{op}: expected floating logits (tokens, classes); got {given}")
    if target.dtype not in (torch.int32, torch.int64):
        raise IlmCompileError(f"{op}: expected a target of int32 or int64; got {given}")
    if any(x.shape != logits.shape[:1] for x in (target, *per_token)):
        raise IlmCompileError(f"{op}: expected one number for each token; got {given}")


def _refuse_unknown(target: Tensor, ignore_index: int, vocab: int) -> None:
    unknown = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if unknown.any():
        token = int(unknown.nonzero()[0])
        raise IlmCompileError(
            f"cross entropy: expected targets in [0, {vocab}), or {ignore_index} to ignore a "
            f"token; got {int(target[token])} at token {token} ({int(unknown.sum())} such); "
            "check the labels against the model's vocabulary"
        )


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(CHUNK // max(logits.shape[1], 1), 1)
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


def _column(
    target: Tensor, first: int, ignore_index: int, num_classes: int
) -> tuple[Tensor, Tensor]:
    """The target's column (N, 1), 0 where this rank has none, and whether it has, (N, 1)."""
    local = (target.to(torch.int64) - first).unsqueeze(-1)
    here = (local >= 0) & (local < num_classes) & (target != ignore_index).unsqueeze(-1)
    return local.masked_fill(~here, 0), here


def _statistics(
    logits: Tensor, target: Tensor, first: int, ignore_index: int, vocab: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("ilm::vocab_statistics", logits, target)
    _refuse_unknown(target, ignore_index, vocab)
    top, sum_exp, picked, total = _statistics_fake(logits, target, first, ignore_index, vocab)
    for part in _chunks(logits):
        x = logits[part].to(top.dtype)
        top[part] = x.amax(-1)
        shift = top[part].masked_fill(top[part] == -inf, 0.0)
        total[part] = x.sum(-1)
        sum_exp[part] = (x - shift.unsqueeze(-1)).exp_().sum(-1)
    column, here = _column(target, first, ignore_index, logits.shape[1])
    picked.copy_(logits.gather(-1, column).masked_fill(~here, 0.0).squeeze(-1))
    return top, sum_exp, picked, total


def _backward(
    logits: Tensor,
    target: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    first: int,
    ignore_index: int,
    label_smoothing: float,
    vocab: int,
) -> Tensor:
    _check("ilm::vocab_cross_entropy_backward", logits, target, logsumexp, grad)
    exact = exact_dtype(logits)
    result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    column, here = _column(target, first, ignore_index, logits.shape[1])
    hit = here.to(exact) * (label_smoothing - 1)
    ignored = (target == ignore_index).unsqueeze(-1)
    for part in _chunks(logits):
        x = logits[part].to(exact, copy=True)
        x.sub_(logsumexp[part].unsqueeze(-1)).exp_().sub_(label_smoothing / vocab)
        x.scatter_add_(-1, column[part], hit[part])
        x.mul_(grad[part].unsqueeze(-1)).masked_fill_(ignored[part], 0.0)  # 0 * nan is nan
        result[part] = x
    return result


def _statistics_fake(
    logits: Tensor, target: Tensor, first: int, ignore_index: int, vocab: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("ilm::vocab_statistics", logits, target)
    exact = exact_dtype(logits)
    top, sum_exp, picked, total = (
        logits.new_empty(logits.shape[:1], dtype=exact) for _ in range(4)
    )
    return top, sum_exp, picked, total


def _backward_fake(
    logits: Tensor,
    target: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    first: int,
    ignore_index: int,
    label_smoothing: float,
    vocab: int,
) -> Tensor:
    _check("ilm::vocab_cross_entropy_backward", logits, target, logsumexp, grad)
    return logits.new_empty(logits.shape)


_TRITON = "ilm_compile.kernels.triton_vocab_loss"
implement("ilm::vocab_statistics", _statistics, f"{_TRITON}:vocab_statistics")
implement("ilm::vocab_cross_entropy_backward", _backward, f"{_TRITON}:vocab_cross_entropy_backward")
torch.library.register_fake("ilm::vocab_statistics", _statistics_fake)
torch.library.register_fake("ilm::vocab_cross_entropy_backward", _backward_fake)
