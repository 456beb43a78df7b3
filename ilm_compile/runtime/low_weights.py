"""Weights in the dtype that a stage computes with: cast once a step, not in every micro-batch.

What a stage casts wherever it uses it (`Stage.read_as`) it is given cast, so that its own casts do
nothing and autograd keeps no copy of the weight for each micro-batch. The weight that is trained
stays as it is, and its gradients are added up in its dtype, each widened before it is added
(`grad_dtype`), as the backward of a cast does. FSDP casts its shards and gathers them cast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ilm_compile.program.lowered import Stage
from ilm_compile.runtime.materialize import places_of, resolve


def lower(stage: Stage, name: str, dtype: torch.dtype) -> nn.Parameter:
    """Put a copy of parameter `name` in `dtype` where `stage` finds the parameter; return it."""
    weight = resolve(stage, name)
    low = nn.Parameter(weight.detach().to(dtype), requires_grad=weight.requires_grad)
    _keep_gradients_in(low, weight.dtype)
    for module, attribute in places_of(stage.module)[id(weight)]:
        setattr(module, attribute, low)
    return low


def refresh(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give each low copy the values of its weight: pairs of (copy, weight)."""
    pairs = list(copies)
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([low for low, _ in pairs], [weight for _, weight in pairs])


def gather_low(module: nn.Module, stage: Stage, dtypes: Mapping[str, torch.dtype]) -> None:
    """Have FSDP gather those of these parameters that it shards with `module` in these dtypes."""
    widths = {}
    for name, dtype in dtypes.items():
        weight = resolve(stage, name)
        if isinstance(weight, DTensor):
            widths[name] = weight.dtype
            local: Any = weight._local_tensor
            # The protocol of torch.distributed.fsdp for what is gathered in another form.
            local.fsdp_pre_all_gather = _Before(local, dtype, weight.placements[0].is_shard(0))
            local.fsdp_post_all_gather = _after
    if not widths:
        return

    def first(*_: object) -> None:
        """FSDP has made the parameters that it gathers into, and keeps them."""
        handle.remove()
        for name, dtype in widths.items():
            _keep_gradients_in(resolve(stage, name), dtype)

    handle = module.register_forward_pre_hook(first)


@dataclass(frozen=True, slots=True, eq=False)
class _Before:
    """Casts what a rank has of a parameter before FSDP gathers it."""

    local: Tensor
    dtype: torch.dtype
    is_padded: bool  # along dimension 0, where ranks may have fewer rows than others

    def __call__(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor], None]:
        low = self.local.detach().to(self.dtype)
        missing = -(-outer_size[0] // mesh.size()) - low.shape[0]
        if self.is_padded and missing:
            low = F.pad(low, (*(0, 0) * (low.dim() - 1), 0, missing))
        return (low,), None


def _after(
    gathered: tuple[Tensor], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor]] | None:
    return (gathered[0], gathered) if out is None else None  # `out` has the memory of `gathered`


def _keep_gradients_in(parameter: Tensor, dtype: torch.dtype) -> None:
    if parameter.requires_grad:
        parameter.grad_dtype = dtype
