"""Tensor parallelism: shard weights and activations over the "tp" axis.

Which placements are legal is the rule table's business, which of them are cheapest the solver's
(`ilm_compile.sharding`); this pass carries the solution out. It inserts the collectives, makes
sizes rank-local and swaps in the vocabulary-parallel ops. Nothing is decided by names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, fx

from ilm_compile.errors import PlanError
from ilm_compile.passes.base import Pass
from ilm_compile.passes.kv_heads import fit_heads
from ilm_compile.passes.pad_vocabulary import pad_vocabulary
from ilm_compile.program.collectives import TRANSITIONS, redistribute
from ilm_compile.program.placement import I, Placement, S
from ilm_compile.program.program import Program
from ilm_compile.program.values import map_tensors
from ilm_compile.sharding import Restrictions, Solution, Strategy, solve
from ilm_compile.sharding.forced import forced_whole
from ilm_compile.sharding.localize import localize
from ilm_compile.sharding.strategy import Call, aten, global_call, has_rule
from ilm_compile.sharding.why import Reasons

AXIS = "tp"


@dataclass(frozen=True, kw_only=True)
class TensorParallel(Pass):
    """Shard the program over `size` ranks; training stays equal up to the order of sums."""

    name: ClassVar[str] = "tensor-parallel"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    ensures: ClassVar[frozenset[str]] = frozenset({"sharded"})
    tolerance: ClassVar[float] = 1e-10

    size: int
    sequence_parallel: bool | None = None
    embed_split_hidden: bool | None = None
    constraints: tuple[tuple[str, str], ...] = ()  # parameter name or glob, and its placement
    hardware: str = "h100"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise PlanError(f"tensor-parallel: size must be positive, got {self.size}")

    def apply(self, program: Program) -> None:
        """Solve for the placements and rewrite the graph."""
        fit_heads(program, self.size)
        pad_vocabulary(program, self.size)
        program.plan = program.plan.replace(tp=self.size)
        if self.size == 1:
            program.decisions.append("tensor-parallel: tp=1, every value is whole on its rank")
            return
        restrictions = Restrictions(
            sequence_parallel=self.sequence_parallel,
            parameters=(*self._constraints(program), *self._embedding_placements(program)),
        )
        solution = solve(program, self.size, restrictions=restrictions, hardware=self.hardware)
        program.reasons = Reasons(solution)
        program.warnings += _forced(program, solution, self.size)
        calls = {node: global_call(node, self.size) for node in solution.strategies}
        for node, placement in solution.placements.items():
            node.meta["placement"] = placement
            node.meta["val"] = map_tensors(partial(_part, placement, self.size), node.meta["val"])
            if node.op == "get_attr":
                program.variables[str(node.target)].placement = placement
        collectives: dict[tuple[fx.Node, Placement], fx.Node] = {}
        for node, strategy in solution.strategies.items():
            _rewrite(node, calls[node], strategy)
            _redistribute_inputs(program, node, strategy, collectives, self.size)
        _reduce_loss(program, collectives, self.size)
        seconds = solution.answer.seconds
        program.decisions += _decisions(program, seconds, self.size, len(collectives))
        program.warnings += _unsharded(program, self.size)

    def _constraints(self, program: Program) -> Iterable[tuple[str, Placement]]:
        names = list(program.parameters())
        for pattern, placement in self.constraints:
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


def _part(placement: Placement, size: int, value: Tensor) -> Tensor:
    return value.new_empty(placement.local_shape(value.shape, size))


def _rewrite(node: fx.Node, call: Call, strategy: Strategy) -> None:
    node.target, node.args, node.kwargs = localize(call, strategy, AXIS)


def _redistribute_inputs(
    program: Program,
    node: fx.Node,
    strategy: Strategy,
    collectives: dict[tuple[fx.Node, Placement], fx.Node],
    size: int,
) -> None:
    """Give `node` every input in the placement its strategy needs."""
    needed = iter(strategy.inputs)

    def place(value: fx.Node) -> fx.Node:
        target = next(needed)
        if value.meta["placement"] == target:
            return value
        if (value, target) not in collectives:
            collectives[value, target] = _insert(program, value, target, node, size)
        return collectives[value, target]

    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), place)


def _insert(
    program: Program, value: fx.Node, target: Placement, user: fx.Node, size: int
) -> fx.Node:
    """Insert the collective that takes `value` to `target`.

    A partial sum is reduced where it is made, anything else is moved where it is first needed: what
    crosses a stage boundary or is kept for a recomputed block is then the smaller of the two.
    """
    source: Placement = value.meta["placement"]
    name, _, _ = TRANSITIONS[source.kind, target.kind]
    early = source.kind == "P"
    point = program.graph.inserting_after(value) if early else program.graph.inserting_before(user)
    with point:
        arguments: dict[str, Any] = {"src": str(source), "dst": str(target), "axis": AXIS}
        node = program.graph.create_node("call_function", redistribute, (value,), arguments, name)
    shape = target.local_shape(source.global_shape(value.meta["val"].shape, size), size)
    node.meta.update(
        val=value.meta["val"].new_empty(shape),
        placement=target,
        source=program.source(value if early else user),
        region=(value if early else user).meta["region"],
        reason=f"{value.name} is {source}, {user.name} needs {target}",
    )
    return node


def _reduce_loss(
    program: Program, collectives: dict[tuple[fx.Node, Placement], fx.Node], size: int
) -> None:
    output = program.graph.output_node()
    loss, *rest = program.outputs
    if loss.meta["placement"] != I:
        loss = collectives.get((loss, I)) or _insert(program, loss, I, output, size)
    output.args = ((loss, *rest),)


def _decisions(program: Program, seconds: float, size: int, num_collectives: int) -> list[str]:
    parameters = program.parameters().values()
    total = sum(_count(v.shape) for v in parameters)
    divided = sum(_count(v.shape) for v in parameters if v.placement.is_shard)
    return [
        f"tensor-parallel: {divided / total:.1%} of the parameters are divided over {size} ranks; "
        f"{num_collectives} collectives and local moves per micro-batch, predicted "
        f"{seconds * 1e3:.3f} ms forward and backward"
    ]


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _forced(program: Program, solution: Solution, size: int) -> list[str]:
    """Return a warning per large value that is made whole, with the op that forced it."""
    found = []
    for value, collective, culprit in forced_whole(solution):
        why = "cannot divide it" if has_rule(culprit.target) else "has no placement rule"
        shape = tuple(value.meta["val"].shape)
        found.append(
            f"tensor-parallel: {value.name} {shape} is made whole on all {size} ranks "
            f"({collective}): {culprit.target} ({culprit.name}) {why} at {program.where(culprit)}"
        )
    return found


def _unsharded(program: Program, size: int) -> list[str]:
    """Return a warning per weight that stays whole, with the op that forced it."""
    if size == 1:
        return []
    found = []
    for node in program.graph.find_nodes(op="get_attr"):
        variable = program.variables[str(node.target)]
        if variable.is_parameter and len(variable.shape) > 1 and not variable.placement.is_shard:
            user = next(iter(node.users))
            why = "cannot be divided" if has_rule(user.target) else "has no placement rule"
            found.append(
                f"tensor-parallel: {variable.name} {variable.shape} stays replicated on all {size} "
                f"ranks: {user.target} {why} at {program.where(user)}"
            )
    return found
