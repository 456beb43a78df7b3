"""Expert parallelism: the ranks of the "ep" axis share the tokens of a micro-batch and its experts.

Activations are sharded over rows or tokens, as data parallelism would. The weights of experts are
sharded by expert, all others are R: each rank holds a part of their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from ilm_compile.passes.expert_rows import name_expert_rows
from ilm_compile.passes.kv_heads import fit_heads
from ilm_compile.passes.shard import Shard
from ilm_compile.program.layout import EXPERT_AXIS, sharded_over
from ilm_compile.program.program import Program
from ilm_compile.sharding import Restrictions, Solution


@dataclass(frozen=True, kw_only=True)
class ExpertParallel(Shard):
    """Shard experts, and activations over tokens, on `size` ranks."""

    name: ClassVar[str] = "expert-parallel"
    axis: ClassVar[str] = EXPERT_AXIS
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    after: ClassVar[frozenset[str]] = frozenset({sharded_over("tp")})
    ensures: ClassVar[frozenset[str]] = frozenset({"sharded", sharded_over(EXPERT_AXIS)})

    def prepare(self, program: Program) -> Restrictions:
        """Repeat key heads where the query heads divide; what does not divide is gathered."""
        fit_heads(program, self, must_divide=False)
        name_expert_rows(program)
        return Restrictions(name=self.name, rows=True)

    def report(self, program: Program, solution: Solution, num_collectives: int) -> None:
        """Which share of the parameters are experts that are divided."""
        parameters = program.parameters().values()
        total = sum(prod(v.shape) for v in parameters)
        divided = sum(prod(v.shape) for v in parameters if v.layout.on(self.axis).is_shard)
        program.decisions.append(
            f"expert-parallel: {divided / total:.1%} of the parameters are divided by expert over "
            f"{self.size} ranks; {num_collectives} collectives and local moves per micro-batch, "
            f"predicted {solution.answer.seconds * 1e3:.3f} ms forward and backward"
        )
        if not divided:
            program.warnings.append(
                f"expert-parallel: no weights are divided by expert over the {self.size} ranks: "
                "the model has none that it multiplies as a batch or in groups, or their number "
                "is no multiple of ep"
            )
