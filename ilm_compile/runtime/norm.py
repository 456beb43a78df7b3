"""The gradient norm: one number for all parameters of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ilm_compile.runtime.mesh import Mesh

_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


def global_norm(counted: Sequence[Tensor], mesh: Mesh) -> Tensor:
    """The 2-norm over the tensors of all ranks, a float64 scalar, equal on all ranks.

    counted: this rank's part; together the ranks must count every element once.
    """
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for group in _by_dtype(counted):
        wide = torch.promote_types(group[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(group, 2, dtype=wide))
        total += norms.double().square().sum()
    if mesh.is_distributed:
        dist.all_reduce(total, group=mesh.group)
    return total.sqrt()


def clip(gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients in place so that their norm, now `norm`, is at most `max_norm`."""
    factor = (max_norm / (norm + _EPSILON)).clamp(max=1.0)
    for group in _by_dtype(gradients):
        torch._foreach_mul_(group, factor.to(group[0].dtype))


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
