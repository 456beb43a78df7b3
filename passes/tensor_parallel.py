"""Tensor parallelism: the ranks of the "tp" axis share every layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from typing import ClassVar

from ilm_compile.ops.call import aten
from ilm_compile.ops.spec import spec_of
from ilm_compile.passes.shard import Shard
from ilm_compile.program.layout import sharded_over
from ilm_compile.program.placement import Placement, S
from ilm_compile.program.program import Program
from ilm_compile.rewrite.kv_heads import fit_heads, share_heads
from ilm_compile.rewrite.pad_vocabulary import pad_vocabulary
from ilm_compile.sharding import Restrictions, Solution
from ilm_compile.sharding.forced import forced_whole
from ilm_compile.sharding.why import Reasons


@dataclass(frozen=True, kw_only=True)
class TensorParallel(Shard):
    """Shard weights and activations over `size` ranks."""

    name: ClassVar[str] = "tensor-parallel"
    axis: ClassVar[str] = "tp"
    ensures: ClassVar[frozenset[str]] = frozenset({"sharded", sharded_over("tp")})

    sequence_parallel: bool | None = None
    embed_split_hidden: bool | None = None
    constraints: tuple[tuple[str, str], ...] = ()  # parameter name or glob, and its placement

    def apply(self, program: Program) -> None:
        super().apply(program)
        if program.plan.cp == 1:  # else that pass says what is repeated before it is sent
            share_heads(program, self.name, masked=False)

    def prepare(self, program: Program) -> Restrictions:
        """Repeat key heads and pad the vocabulary so that both divide."""
        fit_heads(program, self.axis, self.size, name=self.name, instead="")
        pad_vocabulary(program, self.size)
        return Restrictions(
            name=self.name,
            sequence_parallel=self.sequence_parallel,
            parameters=(*self._constraints(program), *self._embedding_placements(program)),
        )

    def foresee(self, program: Program, solution: Solution) -> list[str]:
        """Return a warning per large value that is made whole, with the op that forced it."""
        found = []
        for value, collective, culprit in forced_whole(solution):
            why = "cannot divide it" if spec_of(culprit.target).rule else "has no placement rule"
            shape = tuple(value.meta["val"].shape)
            found.append(
                f"tensor-parallel: {value.name} {shape} is made whole on all {self.size} ranks "
                f"({collective}): {culprit.target} ({culprit.name}) {why} at "
                f"{program.where(culprit)}"
            )
        return found

    def report(self, program: Program, solution: Solution, num_collectives: int) -> None:
        """How much is divided, and which weights are not."""
        program.reasons = Reasons(solution)
        parameters = program.parameters().values()
        total = sum(prod(v.shape) for v in parameters)
        divided = sum(prod(v.shape) for v in parameters if v.layout.is_shard)
        program.decisions.append(
            f"tensor-parallel: {divided / total:.1%} of the parameters are divided over "
            f"{self.size} ranks; {num_collectives} collectives and local moves per micro-batch, "
            f"predicted {solution.answer.seconds * 1e3:.3f} ms forward and backward"
        )
        program.warnings += self._unsharded(program)

    def _constraints(self, program: Program) -> Iterable[tuple[str, Placement]]:
        names = list(program.parameters())
        for pattern, placement in self.constraints if self.size > 1 else ():
            if any(fnmatchcase(name, pattern) for name in names):
                yield pattern, Placement.parse(placement)
                continue
            near = get_close_matches(pattern, names, n=3, cutoff=0.3)
            program.warnings.append(
                f"tensor-parallel: the constraint {pattern!r} matches no parameter, so nothing is "
                f"placed by it; did you mean one of {near}?"
            )

    def _embedding_placements(self, program: Program) -> Iterable[tuple[str, Placement]]:
        if self.embed_split_hidden is None:
            return
        for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default):
            weight = node.args[0]
            if weight.op == "get_attr":
                yield str(weight.target), S(1 if self.embed_split_hidden else 0)

    def _unsharded(self, program: Program) -> list[str]:
        """Return a warning per weight that stays whole, with the op that forced it."""
        found = []
        for node in program.graph.find_nodes(op="get_attr"):
            variable = program.variables[str(node.target)]
            if variable.is_parameter and len(variable.shape) > 1 and not variable.layout.is_shard:
                user = next(iter(node.users))
                why = "cannot be divided" if spec_of(user.target).rule else "has no placement rule"
                found.append(
                    f"tensor-parallel: {variable.name} {variable.shape} stays replicated on all "
                    f"{self.size} ranks: {user.target} {why} at {program.where(user)}"
                )
        return found
