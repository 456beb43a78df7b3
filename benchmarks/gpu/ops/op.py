"""A fused op as the GPU suite sees it: its inputs, how to call it, in plain torch too, its bytes.

The plain versions are what a model without fused kernels runs, in the dtype of its tensors. They
are written anew beside this file, not taken from `ilm_compile.kernels`: they judge it.

Shapes: R rows, or tokens, of width N.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EPS = 1e-5
HIDDEN_SIZES = (64, 100, 768, 2048, 4096, 5120, 6144, 8192, 12288, 16384)

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Maker:
    """Random tensors of a dtype on a device, which differ from call to call."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Of mean 0 and variance 1."""
        options: dict[str, Any] = {"device": self.device, "generator": self.generator}
        return torch.randn(*shape, dtype=dtype or self.dtype, **options)

    def integers(self, below: int, *shape: int) -> Tensor:
        """int64 from 0."""
        return torch.randint(below, shape, device=self.device, generator=self.generator)

    def weight(self, width: int, dtype: torch.dtype | None) -> Tensor:
        """About 1, exact in the dtype of the maker, so that one of another dtype equals it."""
        return (1 + 0.1 * self.normal(width)).to(dtype or self.dtype)

    def angles(self, positions: int, pairs: int) -> Tensors:
        """cos and sin (positions, pairs), float32."""
        angle = 10 * self.normal(positions, pairs, dtype=torch.float32)
        return {"cos": angle.cos(), "sin": angle.sin()}


def maker(device: torch.device, dtype: torch.dtype, seed: int) -> Maker:
    """A maker with a generator of its own."""
    return Maker(device, dtype, torch.Generator(device).manual_seed(seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOp:
    """A fused op under one set of options.

    inputs: takes a maker, R and N. fused, plain: from the inputs to `outputs`. trained: the inputs
    that get gradients. kept: what a backward must read beside the gradients of the outputs.
    written: the inputs whose gradients it must write, one for those that have equal gradients.
    widths: that are checked for correctness, with R from min_rows to max_rows. in_float32: results
    are in float32 whatever the inputs are. slack: on the bounds of errors. has_expanded: rows that
    are all equal leave gradients that are not zero.
    """

    inputs: Callable[[Maker, int, int], Tensors]
    fused: Function
    plain: Function
    outputs: tuple[str, ...]
    trained: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    widths: Sequence[int] = HIDDEN_SIZES
    min_rows: int = 1
    max_rows: int = sys.maxsize
    in_float32: bool = False
    slack: float = 1.0
    has_expanded: bool = True

    def random(
        self, make: Maker, rows: int, width: int
    ) -> tuple[Tensors, list[Tensor], tuple[Tensor, ...]]:
        """Inputs, gradients of the outputs, and the outputs."""
        inputs = self.inputs(make, rows, width)
        with torch.no_grad():
            outputs = self.fused(inputs)
        grads = [make.normal(*out.shape, dtype=out.dtype) for out in outputs]
        return inputs, grads, outputs

    def forward_bytes(self, inputs: Tensors, outputs: Sequence[Tensor]) -> int:
        """Read every input once, write every output once."""
        return sum(t.nbytes for t in (*inputs.values(), *outputs))

    def backward_bytes(self, inputs: Tensors, outputs: Sequence[Tensor]) -> int:
        """Read the gradients of the outputs and what was kept, write gradients, each once."""
        known = inputs | dict(zip(self.outputs, outputs, strict=True))
        grads = sum(t.nbytes for t in outputs)
        return grads + sum(known[name].nbytes for name in (*self.kept, *self.written))
