"""The gradient norm: one number for all parameters of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ilm_compile.runtime.mesh import Mesh

_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


def global_norm(counted: Sequence[Tensor], mesh: Mesh, *, checked: Sequence[Tensor] = ()) -> Tensor:
    """The 2-norm over the tensors of all ranks, a float64 scalar, equal on all ranks.

    counted: this rank's part; together the ranks must count every element once. checked: further
    tensors of this rank. Where one of either kind is not finite on any rank, nor is the result.
    The ranks add up a flag for that beside the squares: a rank whose tensors are not counted may
    be the one that knows.
    """
    squares = _squares(counted, mesh)
    is_bad = ~(squares + _squares(checked, mesh)).isfinite()
    totals = torch.stack([squares, is_bad.double()])
    totals = mesh.everyone.all_reduce(totals)
    norm = totals[0].sqrt()
    return torch.where((totals[1] > 0) & norm.isfinite(), torch.nan, norm)


def clip(
    gradients: Sequence[Tensor], norm: Tensor, max_norm: float | None, *, scale: float = 1.0
) -> None:
    """Divide the gradients by `scale`, and scale their `norm` from there to at most `max_norm`."""
    factor = torch.ones_like(norm)
    if max_norm is not None:
        factor = (max_norm / (norm + _EPSILON)).clamp(max=1.0)
    elif scale == 1.0:
        return
    for group in _by_dtype(gradients):
        torch._foreach_mul_(group, (factor / scale).to(group[0].dtype))


def _squares(tensors: Sequence[Tensor], mesh: Mesh) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for group in _by_dtype(tensors):
        wide = torch.promote_types(group[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(group, 2, dtype=wide))
        total += norms.double().square().sum()
    return total


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
