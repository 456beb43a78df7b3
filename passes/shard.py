"""Sharding over one mesh axis: solve for the placements, and carry the solution out.

Which placements are legal is the rule table's business, which of them are cheapest the solver's
(`ilm_compile.sharding`). `Shard` inserts the collectives, makes sizes rank-local and swaps in the
ops that talk over the axis. It sees a program that is local to the axes sharded before. Nothing is
decided by names.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, fx

from ilm_compile.errors import PlanError
from ilm_compile.ops.strategy import global_call, localize
from ilm_compile.passes.base import Pass, check_hardware
from ilm_compile.program.collectives import TRANSITIONS, redistribute
from ilm_compile.program.expert_rows import OPERAND, ROUTES, route
from ilm_compile.program.layout import MeshAxis, layout_of
from ilm_compile.program.placement import I, Placement
from ilm_compile.program.program import Program
from ilm_compile.program.values import map_tensors
from ilm_compile.rewrite.expert_rows import name_expert_rows
from ilm_compile.sharding import Restrictions, Solution, Strategy, solve

Collectives = dict[tuple[fx.Node, Placement], fx.Node]


@dataclass(frozen=True, kw_only=True)
class Shard(Pass):
    """Shard the program over the `size` ranks of one axis; equal up to the order of sums."""

    axis: ClassVar[str]
    tolerance: ClassVar[float] = 1e-10

    size: int
    hardware: str = "h100"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise PlanError(f"{self.name}: size must be positive, got {self.size}")
        check_hardware(self.name, self.hardware)

    @abstractmethod
    def prepare(self, program: Program) -> Restrictions:
        """Make `program` divisible over the axis; return what the search must keep to."""

    @abstractmethod
    def report(self, program: Program, solution: Solution, num_collectives: int) -> None:
        """Say in `program.decisions` and `program.warnings` what became of the program."""

    def apply(self, program: Program) -> None:
        """Solve for the placements and rewrite the graph."""
        name_expert_rows(program)
        restrictions = self.prepare(program)
        program.plan = program.plan.replace(**{self.axis: self.size})
        if self.size == 1:
            short = f"{self.axis}=1, every value is whole on its rank"
            program.decisions.append(f"{self.name}: {short}")
            return
        axis = program.plan.axis(self.axis)
        solution = solve(program, axis, restrictions=restrictions, hardware=self.hardware)
        warnings = self.foresee(program, solution)
        calls = {node: global_call(node, axis) for node in solution.strategies}
        for node, placement in solution.placements.items():
            node.meta["layout"] = layout_of(node).with_placement(axis.name, placement)
            node.meta["val"] = map_tensors(partial(_part, placement, self.size), node.meta["val"])
            if node.op == "get_attr":
                program.variables[str(node.target)].layout = node.meta["layout"]
        collectives: Collectives = {}
        offsets = solution.search.offsets
        for node, strategy in solution.strategies.items():
            node.target, node.args, node.kwargs = localize(calls[node], strategy, axis.name)
            _redistribute_inputs(program, node, strategy, collectives, axis, offsets)
        _reduce_loss(program, collectives, axis)
        self.report(program, solution, len(collectives))
        program.warnings += warnings

    def foresee(self, program: Program, solution: Solution) -> list[str]:
        """Return warnings about `solution`, before it is carried out."""
        return []


def _part(placement: Placement, size: int, value: Tensor) -> Tensor:
    return value.new_empty(placement.local_shape(value.shape, size))


def _redistribute_inputs(
    program: Program,
    node: fx.Node,
    strategy: Strategy,
    collectives: Collectives,
    axis: MeshAxis,
    offsets: dict[fx.Node, fx.Node],
) -> None:
    """Give `node` every input in the placement its strategy needs."""
    needed = iter(strategy.inputs)

    def place(value: fx.Node) -> fx.Node:
        target = next(needed)
        return moved(value, target)

    def moved(value: fx.Node, target: Placement) -> fx.Node:
        source = axis.placement(value)
        if source == target:
            return value
        if (value, target) not in collectives:
            pair = source.kind, target.kind
            by = moved(offsets[value], Placement(OPERAND[pair])) if pair in ROUTES else None
            collectives[value, target] = _insert(program, value, target, node, axis, by)
        return collectives[value, target]

    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), place)


def _insert(
    program: Program,
    value: fx.Node,
    target: Placement,
    user: fx.Node,
    axis: MeshAxis,
    offsets: fx.Node | None = None,
) -> fx.Node:
    """Insert the collective that takes `value` to `target`.

    A partial sum is reduced where it is made, anything else is moved where it is first needed: what
    crosses a stage boundary or is kept for a recomputed block is then the smaller of the two.
    """
    source = axis.placement(value)
    name, _, _ = (TRANSITIONS if offsets is None else ROUTES)[source.kind, target.kind]
    early = source.kind == "P" and offsets is None
    function, inputs = (redistribute, (value,)) if offsets is None else (route, (value, offsets))
    point = program.graph.inserting_after(value) if early else program.graph.inserting_before(user)
    with point:
        arguments: dict[str, Any] = {"src": str(source), "dst": str(target), "axis": axis.name}
        node = program.graph.create_node("call_function", function, inputs, arguments, name)
    whole = source.global_shape(value.meta["val"].shape, axis.size)
    node.meta.update(
        val=value.meta["val"].new_empty(target.local_shape(whole, axis.size)),
        layout=layout_of(value).with_placement(axis.name, target),
        source=program.source(value if early else user),
        region=(value if early else user).meta["region"],
        reason=f"{value.name} is {source}, {user.name} needs {target}",
    )
    return node


def _reduce_loss(program: Program, collectives: Collectives, axis: MeshAxis) -> None:
    output = program.graph.output_node()
    loss, *rest = program.outputs
    if axis.placement(loss) != I:
        loss = collectives.get((loss, I)) or _insert(program, loss, I, output, axis)
    output.args = ((loss, *rest),)
