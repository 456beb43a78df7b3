"""Expert parallelism: the ranks of the "ep" axis share the tokens of a micro-batch and its experts.

Activations are sharded over rows or tokens, as data parallelism would. The weights of experts are
sharded by expert, all others are R: each rank holds a part of their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from torch import fx

from ilm_compile.passes.shard import Shard
from ilm_compile.program.expert_rows import ROUTES, route, route_of, sort_rows
from ilm_compile.program.layout import EXPERT_AXIS, sharded_over
from ilm_compile.program.program import Program
from ilm_compile.rewrite.kv_heads import fit_heads
from ilm_compile.sharding import Restrictions, Solution

BYTES = 2  # of a number, as plans are made for bfloat16


@dataclass(frozen=True, kw_only=True)
class ExpertParallel(Shard):
    """Shard experts, and activations over tokens, on `size` ranks."""

    name: ClassVar[str] = "expert-parallel"
    axis: ClassVar[str] = EXPERT_AXIS
    after: ClassVar[frozenset[str]] = frozenset({sharded_over("tp")})
    ensures: ClassVar[frozenset[str]] = frozenset({"sharded", sharded_over(EXPERT_AXIS)})

    dispatch: bool | None = None  # rows to their experts, or tokens gathered; None: by cost

    def prepare(self, program: Program) -> Restrictions:
        """Repeat key heads where the query heads divide; what does not divide is gathered."""
        fit_heads(program, self.axis, self.size, name=self.name)
        return Restrictions(name=self.name, rows=True, dispatch=self.dispatch)

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
        program.decisions += self._forms(program)
        if not divided:
            program.warnings.append(
                f"expert-parallel: no weights are divided by expert over the {self.size} ranks: "
                "the model has none that it multiplies as a batch or in groups, or their number "
                "is no multiple of ep"
            )

    def _forms(self, program: Program) -> list[str]:
        """How rows reach their experts, and what each way sends forward, of bfloat16 values."""
        axis = program.plan.axis(self.axis)
        forms: dict[str, list[fx.Node]] = {"dispatch": [], "take": []}
        for node in program.graph.find_nodes(op="call_function", target=route):
            name = ROUTES[route_of(node)][0]
            if name in forms and node.meta["val"].is_floating_point():
                forms[name].append(node)
        found = []
        for name, nodes in forms.items():
            if not nodes:
                continue
            rows, width = axis.shape(nodes[0])
            repeats: Any = next(n.args[2] for n in _before(nodes[0]) if n.target is sort_rows)
            share = 2 * BYTES * width * (self.size - 1) / self.size  # there and back
            ways = {
                "dispatch": f"dispatched (all_to_all, {share * rows / self.size:,.0f} B per rank)",
                "take": f"taken from gathered tokens ({share * rows / repeats:,.0f} B per rank)",
            }
            chosen = ways.pop(name)
            found.append(
                f"expert-parallel: in {len(nodes)} layers rows of experts are {chosen}, not "
                f"{next(iter(ways.values()))}, forward and evenly spread"
            )
        return found


def _before(node: fx.Node) -> Iterator[fx.Node]:
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        yield node
