"""The search: the cheapest legal placements, as an integer program over one copy of each block.

Each cluster of equal calls picks one strategy of its rule, each parameter one placement at rest,
and each value that is needed in another placement than it was made in pays for the collective, once
for all who need it, forward and backward. Costs are seconds on the given hardware: the roofline for
calls, the alpha-beta model for collectives. It runs twice: first for the least share of weights and
of FLOPs (on a token axis of activations too) that every rank repeats, then for time among the plans
that reach it. So whatever can be divided is divided, at any size: the search chooses how, not
whether.

The linear program of an edge (one variable per pair of producer and consumer placement, with the
pairs' sums tied to both choices) is the usual relaxation of a pairwise model, as in Alpa
(arXiv:2201.12023, section 4.2); HiGHS solves it through scipy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import torch
from torch import fx

from ilm_compile.cost import Hardware, collective_time, forward_flops, hardware_named, node_time
from ilm_compile.cost.ring import ring_time
from ilm_compile.errors import PlanError
from ilm_compile.ops.attention import (
    TOKEN_DIM,
    has_mask,
    is_by_queries,
    is_causal,
    slowest,
    way,
)
from ilm_compile.ops.call import Call, Strategy, aten, tensor_inputs
from ilm_compile.ops.experts import is_expert_weight, offsets_of, routing
from ilm_compile.ops.reductions import exchanged
from ilm_compile.ops.strategy import global_call, plain_placements, strategies
from ilm_compile.ops.views import VIEWS
from ilm_compile.program.expert_rows import ROUTES, SENT
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.layout import EXPERT_AXIS, TOKEN_AXES, MeshAxis
from ilm_compile.program.placement import E, I, Placement, R, S, rows_of
from ilm_compile.program.program import Program
from ilm_compile.program.values import is_real, shapes_of
from ilm_compile.sharding.clusters import Cluster, cluster_nodes
from ilm_compile.sharding.folding import cut_once, one_fold
from ilm_compile.sharding.integer_program import Answer, IntegerProgram, Vector
from ilm_compile.sharding.transitions import Restrictions, allowed, token_dims, transition_time

DTYPE = torch.bfloat16  # plans are made for training at scale, whatever the model's dtype is now
EXACT_BYTES = 4  # of a number that ranks reduce inside an op
PARTIAL = 1e-6  # seconds, against carrying a partial sum through further ops


@dataclass(frozen=True, slots=True)
class Solution:
    """The chosen strategy of every call and the placement of every other value."""

    strategies: dict[fx.Node, Strategy]
    placements: dict[fx.Node, Placement]
    answer: Answer  # predicted seconds of a micro-batch, forward and backward
    search: Search


@dataclass(frozen=True, slots=True)
class Move:
    """A value taken to another placement, and the predicted seconds in all repeats of a block."""

    node: fx.Node
    source: Placement
    target: Placement
    seconds: float


def solve(
    program: Program, axis: MeshAxis, *, restrictions: Restrictions, hardware: str = "h100"
) -> Solution:
    """Return the cheapest placements of `program` over the ranks of `axis`.

    Raises `PlanError` when the restrictions leave no legal choice.
    """
    return Search(program, axis, restrictions, hardware_named(hardware)).run()


class Search:
    """The integer program of one graph; it outlives the search, to say what else was possible."""

    def __init__(
        self, program: Program, axis: MeshAxis, restrictions: Restrictions, hardware: Hardware
    ) -> None:
        self.program, self.axis, self.size = program, axis, axis.size
        self.restrictions, self.hardware = restrictions, hardware
        self.gradients = gradient_nodes(program.graph)
        self.offsets = offsets_of(program.graph) if axis.name == EXPERT_AXIS else {}
        self.weighted = _weighted_nodes(program)
        self.clusters = cluster_nodes(program, restrictions.fixed)
        self.members: dict[Cluster, list[fx.Node]] = defaultdict(list)
        for node, cluster in self.clusters.items():
            self.members[cluster].append(node)
        self.weight_total, self.flops_total = _totals(program)
        self.elements_total = max(1, sum(map(_elements, self.weighted)))
        self.choices: dict[Cluster, list[Strategy]] = {}
        self.first: dict[Cluster, int] = {}  # column of a cluster's first choice
        self.moves: dict[int, Move] = {}  # the placement changes behind the columns that cost time
        self.problem = IntegerProgram()
        for node in reversed(list(program.graph.nodes)):
            cluster = self.clusters[node]
            if node.op != "output" and cluster not in self.choices:
                self.choices[cluster] = self._choices(node)
        for cluster, options in self.choices.items():
            costs = [self._call_cost(cluster, option) for option in options]
            columns = [self.problem.variable(*cost, integral=True) for cost in costs]
            self.first[cluster] = columns[0]
            self.problem.row([(column, 1.0) for column in columns], 1, 1)
        self._edges()

    def run(self) -> Solution:
        """Return the best solution. Raises `PlanError` if there is none."""
        answer = self.problem.solve()
        if answer is None:
            raise PlanError(
                f"{self.restrictions.name}: no legal placement over size={self.size} ranks under "
                f"{self.restrictions}; drop a restriction"
            )
        chosen = {cluster: self._chosen(cluster, answer.values) for cluster in self.choices}
        if not self._is_by_queries(chosen):  # then nothing is gained by head and tail pieces
            chosen = {cluster: cut_once(strategy) for cluster, strategy in chosen.items()}
        by_node = {node: chosen[c] for node, c in self.clusters.items() if node.op != "output"}
        return Solution(
            strategies={n: s for n, s in by_node.items() if n.op == "call_function"},
            placements={n: s.output for n, s in by_node.items()},
            answer=answer,
            search=self,
        )

    def _chosen(self, cluster: Cluster, values: Vector) -> Strategy:
        start = self.first[cluster]
        return next(o for i, o in enumerate(self.choices[cluster]) if values[start + i] > 0.5)

    def _is_by_queries(self, chosen: dict[Cluster, Strategy]) -> bool:
        """Whether some causal attention is sharded by queries."""
        calls = (global_call(node, self.axis) for node in self.clusters if node.target in TOKEN_DIM)
        return any(
            is_causal(call) and is_by_queries(call, chosen[self.clusters[call.node]])
            for call in calls
        )

    def _choices(self, node: fx.Node) -> list[Strategy]:
        """Return what `node`'s cluster may choose from; those of its users are known already."""
        if node.op == "placeholder":
            return [Strategy((), I)]
        wanted = {want for user in node.users for want in self._wants(node, user)}
        shape = shapes_of(node)[0]
        if node in self.offsets:
            wanted |= {E, *(rows_of("D", p) for p in wanted if p.kind == "T")}
        if node.op == "get_attr":
            variable = self.program.variables[str(node.target)]
            if not variable.is_parameter:
                return [Strategy((), I)]
            if self.axis.name in TOKEN_AXES:
                return [Strategy((), p) for p in (R, *self._expert_shards(node, wanted))]
            shards = {w for w in wanted if w.is_shard and w.divides(shape, self.size)}
            at_rest = [I, *sorted(shards, key=str)]
            return [Strategy((), p) for p in self.restrictions.parameter(variable.name, at_rest)]
        call = global_call(node, self.axis)
        if node not in self.weighted:  # integers, masks, tables: cheap, the same everywhere
            return strategies(call, ())[:1]
        folded = {
            S(dim, folded=True) for dim, n in enumerate(shape) if n in self.restrictions.folded
        }
        wanted |= plain_placements(shape, self.size) | folded
        options = strategies(call, sorted(wanted, key=str))
        options = one_fold(options, is_folded=bool(self.restrictions.folded))
        if node.target in TOKEN_DIM:
            options = self.restrictions.attention_by(call, options, self.program.where(node))
        tokens = token_dims(shape, self.size)
        if self.restrictions.sequence_parallel and tokens and not forward_flops(node):
            options = [option for option in options if option.output.kind in "SP"] or options
        return options

    def _expert_shards(self, node: fx.Node, wanted: set[Placement]) -> set[Placement]:
        """Return how a parameter lies whose dimension 0 counts experts, each with a matrix."""
        if self.axis.name != EXPERT_AXIS or not is_expert_weight(node):
            return set()
        return {S(0)} & wanted if S(0).divides(shapes_of(node)[0], self.size) else set()

    def _wants(self, node: fx.Node, user: fx.Node) -> list[Placement]:
        if user.op == "output":
            return []
        positions = [i for i, value in enumerate(tensor_inputs(user)) if value is node]
        options = self.choices[self.clusters[user]]
        return [option.inputs[i] for option in options for i in positions]

    def _call_cost(self, cluster: Cluster, option: Strategy) -> tuple[float, float]:
        """Return (seconds, share of the model's weights and FLOPs that every rank repeats)."""
        nodes = self.members[cluster]
        node = nodes[0]
        if node.op == "get_attr":
            weights = _weight(self.program, node) * (not option.output.is_shard)
            return 0.0, len(nodes) * weights / self.weight_total
        if node.op != "call_function":
            return 0.0, 0.0
        call = global_call(node, self.axis)
        shards = self.size if any(p.cuts for p in (*option.inputs, option.output)) else 1
        directions = (False, True) if node in self.gradients else (False,)
        times: Iterable[float] = (
            node_time(node, self.hardware, shards=shards, dtype=DTYPE, backward=backward)
            * slowest(call, option)
            for backward in directions
        )
        if node.target in TOKEN_DIM and way(call, option) == "ring":
            times = self._ring(call, option, times)
        seconds = sum(times)
        seconds += sum(map(self._exchange, exchanged(call, option)[: len(directions)]))
        flops = forward_flops(node)
        # Sums are made whole where they arise: in low precision, partial ones drift apart.
        kept_partial = PARTIAL * (option.output.kind == "P" and not flops)
        repeated = flops / self.flops_total
        if self.axis.name in TOKEN_AXES and node in self.weighted:
            repeated += _elements(node) / self.elements_total
        return len(nodes) * (seconds + kept_partial), len(nodes) * repeated * (shards == 1)

    def _ring(self, call: Call, option: Strategy, times: Iterable[float]) -> Iterator[float]:
        """Yield the seconds of an attention's directions, which take `times`, with its messages."""
        held = zip(option.inputs[:3], call.shapes, strict=False)
        shapes = [placement.local_shape(shape, self.size) for placement, shape in held]
        for backward, seconds in enumerate(times):
            yield ring_time(
                *(seconds, shapes),
                itemsize=DTYPE.itemsize,
                is_masked=has_mask(call),
                size=self.size,
                hardware=self.hardware,
                backward=bool(backward),
            )

    def _exchange(self, numbers: int) -> float:
        """Return the seconds of reducing `numbers` inside an op, but for the latency.

        That of two collectives would decide for small models, which are to be placed as big ones.
        """
        whole, least = (
            collective_time("all_reduce", n, self.size, self.hardware)
            for n in (numbers * EXACT_BYTES, 1)
        )
        return max(0.0, whole - least)

    def _edges(self) -> None:
        """Tie every producer's choice to its consumers', at the price of the transitions."""
        consumers: dict[Cluster, dict[tuple[Cluster, int], None]] = defaultdict(dict)
        for node in self.program.calls():
            for position, value in enumerate(tensor_inputs(node)):
                consumers[self.clusters[value]][self.clusters[node], position] = None
        loss = self.program.outputs[0]
        for producer, edges in consumers.items():
            made = self._by_placement(producer, lambda s: s.output)
            paid: dict[tuple[Placement, Placement], int] = {}
            for consumer, position in edges:
                needed = self._by_placement(consumer, partial(_input, position))
                self._edge(self.members[producer], made, needed, paid, shared=len(edges) > 1)
        made = self._by_placement(self.clusters[loss], lambda s: s.output)
        self._edge([loss], made, {I: []}, {}, shared=False)

    def _by_placement(
        self, cluster: Cluster, key: Callable[[Strategy], Placement]
    ) -> dict[Placement, list[int]]:
        grouped: dict[Placement, list[int]] = defaultdict(list)
        for i, option in enumerate(self.choices[cluster]):
            grouped[key(option)].append(self.first[cluster] + i)
        return grouped

    def _edge(
        self,
        producers: list[fx.Node],
        made: dict[Placement, list[int]],
        needed: dict[Placement, list[int]],
        paid: dict[tuple[Placement, Placement], int],
        *,
        shared: bool,
    ) -> None:
        node = producers[0]
        is_activation = node in self.weighted
        by_source: dict[Placement, list[int]] = defaultdict(list)
        by_target: dict[Placement, list[int]] = defaultdict(list)
        for source in made:
            for target in needed:
                if not self._is_allowed(node, source, target, is_activation):
                    continue
                seconds = len(producers) * transition_time(
                    node, source, target, self.size, self.hardware, node in self.gradients
                )
                if shared and seconds:
                    flow = self.problem.variable(0.0)
                    if (source, target) not in paid:
                        paid[source, target] = self._move(node, source, target, seconds)
                    self.problem.row([(paid[source, target], 1.0), (flow, -1.0)], 0, np.inf)
                else:
                    flow = self._move(node, source, target, seconds)
                by_source[source].append(flow)
                by_target[target].append(flow)
        for source, columns in made.items():
            terms = [(f, 1.0) for f in by_source[source]] + [(x, -1.0) for x in columns]
            self.problem.row(terms, 0, 0)
        for target, columns in needed.items():
            total = 1.0 if not columns else 0.0
            terms = [(f, 1.0) for f in by_target[target]] + [(x, -1.0) for x in columns]
            self.problem.row(terms, total, total)

    def _is_allowed(
        self, node: fx.Node, source: Placement, target: Placement, is_activation: bool
    ) -> bool:
        shape = shapes_of(node)[0]
        if (source.kind, target.kind) in ROUTES:
            is_same = (source.segments, source.folded) == (target.segments, target.folded)
            is_same &= self.restrictions.dispatch in (None, (source.kind, target.kind) in SENT)
            return node in self.offsets and is_same and target.divides(shape, self.size)
        if self.axis.name == EXPERT_AXIS and source != target and is_expert_weight(node):
            return not source.is_shard  # tokens go to the experts, not experts to the tokens
        args = self.program, node, source, target, self.size, self.restrictions, is_activation
        return allowed(*args)

    def _move(self, node: fx.Node, source: Placement, target: Placement, seconds: float) -> int:
        column = self.problem.variable(seconds)
        if source != target:
            self.moves[column] = Move(node, source, target, seconds)
        return column


def _input(position: int, strategy: Strategy) -> Placement:
    return strategy.inputs[position]


def _weighted_nodes(program: Program) -> set[fx.Node]:
    """Return the parameters, trained or frozen, and the real numbers that are computed from them.

    So is the place of a largest one, which can be found without gathering them, and what says which
    row goes to which expert.
    """
    routes = routing(program.graph)
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            is_found = program.variables[str(node.target)].is_parameter
        else:
            counts = is_real(node) or node.target is aten.argmax.default or node in routes
            is_found = counts and not found.isdisjoint(node.all_input_nodes)
        if is_found:
            found.add(node)
    return found


def _weight(program: Program, node: fx.Node) -> int:
    """Return the size of a weight; 0 for what is small anyway: biases, norms and buffers."""
    variable = program.variables[str(node.target)]
    return prod(variable.shape) if variable.is_parameter and len(variable.shape) > 1 else 0


def _elements(node: fx.Node) -> int:
    """Return how many numbers a call reads and writes: on a token axis all of them are divided.

    Views make none: keys may be gathered before they are repeated for the query heads.
    """
    if node.op != "call_function" or node.target in VIEWS:
        return 0
    return sum(prod(shape) for n in (node, *tensor_inputs(node)) for shape in shapes_of(n))


def _totals(program: Program) -> tuple[int, int]:
    weights = sum(_weight(program, node) for node in program.graph.find_nodes(op="get_attr"))
    return max(1, weights), max(1, sum(forward_flops(node) for node in program.calls()))
