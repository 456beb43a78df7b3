"""Context parallelism: the ranks of the "cp" axis share every sequence.

Activations are sharded over tokens, parameters are R: each rank holds a part of their gradients.
Attention needs every key: either it is computed by heads, and an all-to-all exchanges tokens for
heads before and after it (DeepSpeed-Ulysses, arXiv:2309.14509), or by queries, and keys and values
are gathered. The search chooses by cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ilm_compile.cost import forward_flops
from ilm_compile.passes.shard import Shard
from ilm_compile.program.layout import sharded_over
from ilm_compile.program.program import Program
from ilm_compile.sharding import Restrictions, Solution


@dataclass(frozen=True, kw_only=True)
class ContextParallel(Shard):
    """Shard activations over tokens on `size` ranks."""

    name: ClassVar[str] = "context-parallel"
    axis: ClassVar[str] = "cp"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    after: ClassVar[frozenset[str]] = frozenset({sharded_over("tp")})
    ensures: ClassVar[frozenset[str]] = frozenset({"sharded", sharded_over("cp")})

    def prepare(self, program: Program) -> Restrictions:
        """Nothing needs to be made divisible: what does not divide is gathered."""
        return Restrictions(name=self.name)

    def report(self, program: Program, solution: Solution, num_collectives: int) -> None:
        """What share of the work is divided."""
        flops = {node: forward_flops(node) for node in solution.strategies}
        divided = sum(
            count
            for node, count in flops.items()
            if any(p.is_shard for p in (*solution.strategies[node].inputs,))
        )
        share = divided / max(1, sum(flops.values()))
        program.decisions.append(
            f"context-parallel: sequences are divided over {self.size} ranks, {share:.1%} of the "
            f"FLOPs with them; {num_collectives} collectives and local moves per micro-batch, "
            f"predicted {solution.answer.seconds * 1e3:.3f} ms forward and backward"
        )
