"""Fused ops in the place of what computes the same: RMSNorm, LayerNorm, rotary
positions, SwiGLU, GeGLU.

Patterns are found in the graph, whatever the model calls its modules. The ops have a Triton kernel
on CUDA and a torch reference on the CPU (`ilm_compile.kernels`), so a fused program can be checked
anywhere. Sums with a residual are fused later, by `FuseResidual`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from ilm_compile.errors import PlanError
from ilm_compile.passes.base import Pass
from ilm_compile.program.dump import target_name
from ilm_compile.program.program import Program
from ilm_compile.rewrite.fuse_glu import fuse_glus
from ilm_compile.rewrite.fuse_norm import fuse_layer_norms, fuse_rms_norms
from ilm_compile.rewrite.fuse_rotary import fuse_rotaries
from ilm_compile.rewrite.fusion import Found

PATTERNS: dict[str, Callable[[Program], Found]] = {
    "rms_norm": fuse_rms_norms,
    "layer_norm": fuse_layer_norms,
    "rotary": fuse_rotaries,
    "glu": fuse_glus,
}


@dataclass(frozen=True, kw_only=True)
class FuseKernels(Pass):
    """Replace the `patterns` by fused ops, before tensor parallelism, which has rules for them.

    In float64 the program computes the same up to the order of sums, 1e-10. In bfloat16 a fused op
    rounds where the calls that it replaces do, or in fewer places: `tolerance` is what that moves a
    loss by.
    """

    name: ClassVar[str] = "fuse-kernels"
    before: ClassVar[frozenset[str]] = frozenset({"sharded", "cast", "split"})
    ensures: ClassVar[frozenset[str]] = frozenset({"fused"})
    numerics: ClassVar[Literal["preserving", "changing"]] = "changing"
    tolerance: ClassVar[float] = 2e-3

    patterns: tuple[str, ...] = tuple(PATTERNS)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.patterns) - set(PATTERNS)):
            raise PlanError(f"{self.name}: unknown patterns {unknown}, known are {list(PATTERNS)}")

    def apply(self, program: Program) -> None:
        for pattern in self.patterns:
            report(program, self.name, pattern, PATTERNS[pattern](program))


def report(program: Program, name: str, pattern: str, found: Found) -> None:
    """Say in ``program.decisions`` what was fused, and what was left and why."""
    counts = Counter(target_name(node) for node in found.fused)
    fused = " and ".join(f"{count} {op}" for op, count in sorted(counts.items()))
    program.decisions.append(f"{name}: {fused or f'no {pattern}'} in the place of plain calls")
    reasons: dict[str, list[str]] = {}
    for left in found.left:
        reasons.setdefault(left.reason, []).append(program.where(left.node))
    program.decisions += [
        f"{name}: {len(where)} {pattern} left alone, first {where[0]}: {reason}"
        for reason, where in reasons.items()
    ]
