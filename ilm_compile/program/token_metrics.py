"""Loss and hits of every single token, from whole logits or from logits sharded by vocabulary.

Sharded logits are not gathered: three numbers per token are reduced over the axis, and a fourth
tells which rank has the largest logit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ilm_compile.program.communicator import Communicator


@dataclass(frozen=True, slots=True)
class TokenMetrics:
    """Of N tokens, (N,) each, the same on every rank of the axis.

    losses: cross entropy, float64 for float64 logits, else float32; 0 where not `counted`. hits:
    whether the target has the largest logit, the first of equals as `torch.argmax`. counted:
    whether there is a target.
    """

    losses: Tensor
    hits: Tensor
    counted: Tensor


@torch.no_grad()
def token_metrics(
    logits: Tensor, target: Tensor, *, ignore_index: int, comm: Communicator | None
) -> TokenMetrics:
    """Return the metrics of logits (N, classes) and class numbers (N,).

    comm: the ranks over which the classes are sharded, each holding (N, classes / size); None if
    they are whole. Extra memory: a float32 copy of 16-bit logits.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    width = logits.shape[-1]
    first = 0 if comm is None else comm.rank * width
    counted = target != ignore_index
    local = target - first
    here = (local >= 0) & (local < width) & counted
    column = local.masked_fill(~here, 0).unsqueeze(-1)
    picked = logits.gather(-1, column).squeeze(-1).masked_fill(~here, 0.0)
    top, best = logits.max(-1)
    best = best + first
    log_sum = logits.logsumexp(-1)
    if comm is not None:
        highest = comm.all_reduce(top, op="max")
        # Of equal logits the first counts, so the smallest class number among the ranks.
        absent = torch.iinfo(best.dtype).max
        best = -comm.all_reduce(-best.masked_fill(top != highest, absent), op="max")
        parts = torch.stack([(log_sum - highest).exp(), picked])
        total, picked = comm.all_reduce(parts).unbind(0)
        log_sum = total.log() + highest
    return TokenMetrics(
        losses=(log_sum - picked).masked_fill(~counted, 0.0),
        hits=(best == target) & counted,
        counted=counted,
    )
