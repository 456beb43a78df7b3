"""Batches of random data for the inputs of any program."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ilm_compile.program.program import Input

IGNORED = -100


def random_batch(inputs: Mapping[str, Input], count: int, vocab_size: int) -> dict[str, Tensor]:
    """Return `count` micro-batches of random data, with very unequal numbers of targets."""
    generator = torch.Generator().manual_seed(0)
    batch = {}
    for name, spec in inputs.items():
        shape = (spec.shape[0] * count, *spec.shape[1:])
        if spec.dtype.is_floating_point:
            batch[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        elif name == "cu_seqlens":
            batch[name] = _boundaries(shape, inputs, spec.dtype)
        elif name == "attention_mask":
            batch[name] = torch.ones(shape, dtype=spec.dtype)
        elif name == "position_ids":
            batch[name] = torch.arange(shape[-1]).expand(shape).to(spec.dtype).contiguous()
        else:
            batch[name] = torch.randint(0, vocab_size, shape, generator=generator, dtype=spec.dtype)
        if name == "labels" and len(shape) > 1:
            for row in range(shape[0]):
                batch[name][row, : (5 * row) % (shape[1] - 1)] = IGNORED
    return batch


def _boundaries(shape: tuple[int, ...], inputs: Mapping[str, Input], dtype: torch.dtype) -> Tensor:
    """Return document boundaries: two documents in each row, the second one longer."""
    length = max(i.shape[1] for n, i in inputs.items() if n != "cu_seqlens" and len(i.shape) > 1)
    row = [0, length // 3, *([length] * (shape[1] - 2))]
    return torch.tensor(row, dtype=dtype).expand(shape).contiguous()
