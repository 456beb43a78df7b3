"""Runs of an op, and how far they are from float64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.gpu.ops.op import Function, KernelOp, Tensors

# Of ||out - reference|| / ||reference||.
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
# What roundings alone make: one at the end, or several where all is computed in the dtype.
ROUNDING = {torch.float32: 4e-7, torch.float16: 4.9e-4, torch.bfloat16: 3.9e-3}
ON_CPU = 2**21  # elements of an input up to which the reference runs on the CPU


def run(
    op: KernelOp, function: Function, inputs: Tensors, grads: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Outputs and gradients of the trained inputs, by name."""
    leaves = {n: t.detach().requires_grad_(n in op.trained) for n, t in inputs.items()}
    outputs = function(leaves)
    found = dict(zip(op.outputs, outputs, strict=True))
    if op.trained:
        wanted = [leaves[name] for name in op.trained]
        results = torch.autograd.grad(outputs, wanted, list(grads))
        found |= {f"grad of {n}": g for n, g in zip(op.trained, results, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Tensors that are made without a value are full of NaN inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ops that may add in any order
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            if not torch.empty(8, device=device).isnan().all():
                raise RuntimeError("expected new tensors to be NaN under deterministic algorithms")
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def exactly(inputs: Tensors, grads: Sequence[Tensor]) -> tuple[Tensors, list[Tensor]]:
    """The same in float64; on the CPU, unless they are large."""
    large = max(t.numel() for t in inputs.values()) > ON_CPU
    device = next(iter(inputs.values())).device if large else torch.device("cpu")

    def widen(x: Tensor) -> Tensor:
        return x.to(device, torch.float64 if x.is_floating_point() else x.dtype)

    return {n: widen(t) for n, t in inputs.items()}, [widen(g) for g in grads]


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Infinity where anything is NaN."""
    difference = (found.to(reference.device).double() - reference.double()).norm()
    error = float(difference / reference.double().norm())
    return error if error == error else torch.inf
