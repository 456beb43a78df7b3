"""Context parallelism: the ranks of the "cp" axis share every sequence.

Activations are sharded over tokens, parameters are R: each rank holds a part of their gradients.
Attention needs every key, so it is computed by heads: an all-to-all exchanges tokens for heads
before and after it (DeepSpeed-Ulysses, arXiv:2309.14509). Where the ranks do not divide the heads,
it is computed whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ilm_compile.cost import forward_flops
from ilm_compile.passes.kv_heads import fit_heads
from ilm_compile.passes.shard import Shard
from ilm_compile.program.dump import target_name
from ilm_compile.program.layout import sharded_over
from ilm_compile.program.program import Program
from ilm_compile.sharding import Restrictions, Solution


@dataclass(frozen=True, kw_only=True)
class ContextParallel(Shard):
    """Shard activations over tokens on `size` ranks."""

    name: ClassVar[str] = "context-parallel"
    axis: ClassVar[str] = "cp"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    after: ClassVar[frozenset[str]] = frozenset({sharded_over("tp"), sharded_over("ep")})
    ensures: ClassVar[frozenset[str]] = frozenset({"sharded", sharded_over("cp")})

    def prepare(self, program: Program) -> Restrictions:
        """Repeat key heads where the query heads divide; what does not divide is gathered."""
        fit_heads(program, self, must_divide=False)
        return Restrictions(name=self.name)

    def report(self, program: Program, solution: Solution, num_collectives: int) -> None:
        """What share of the work is divided."""
        flops = {node: forward_flops(node) for node in solution.strategies}
        whole = [n for n, s in solution.strategies.items() if not any(p.cuts for p in s.inputs)]
        repeated = {node: flops[node] for node in whole if flops[node]}
        share = 1 - sum(repeated.values()) / max(1, sum(flops.values()))
        program.decisions.append(
            f"context-parallel: sequences are divided over {self.size} ranks, {share:.1%} of the "
            f"FLOPs with them; {num_collectives} collectives and local moves per micro-batch, "
            f"predicted {solution.answer.seconds * 1e3:.3f} ms forward and backward"
        )
        if repeated:
            worst = max(repeated, key=repeated.__getitem__)
            program.warnings.append(
                f"context-parallel: {len(repeated)} products and attentions, {1 - share:.1%} of "
                f"the FLOPs, are computed whole on all {self.size} ranks, the largest of them "
                f"{target_name(worst)} at {program.where(worst)}"
            )
