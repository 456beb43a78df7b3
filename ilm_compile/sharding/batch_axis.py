"""How every value of a traced step depends on the rows of the batch.

A micro-batch is one slice of the global batch along its rows, so "micro-batches are averaged to the
loss of the global batch" is a statement about one more axis: inputs are sharded by rows, parameters
are the same everywhere. The placement rules that shard a model say what each op makes of that. What
they are given is two traces of one model, of a slice and of a whole batch twice as large: sizes and
factors that grow with the batch are those that differ. A sum over rows that inputs alone decide, as
a number of targets, can be counted in the whole batch before a step, and so is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import log2
from operator import mul
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.ops import batch_constants as constants
from ilm_compile.ops.call import Call, tensor_inputs
from ilm_compile.ops.losses import of_tokens
from ilm_compile.ops.pointwise import pointwise
from ilm_compile.ops.spec import spec_of
from ilm_compile.ops.strategy import global_call, localize, strategies
from ilm_compile.program.dropout import SEED
from ilm_compile.program.input_graph import graph_from_inputs
from ilm_compile.program.layout import MeshAxis
from ilm_compile.program.placement import P, Placement, R, S
from ilm_compile.program.program import Program
from ilm_compile.program.reductions import MEAN, partial_mean
from ilm_compile.sharding.row_orders import RowOrders, RowsMix

SLICES = 2  # the whole batch has this many slices
BATCH = MeshAxis("batch", {"batch": SLICES})


@dataclass(frozen=True, slots=True)
class Known:
    """A value of which the whole batch's is known from those of the slices.

    S: their concatenation; P: their sum; R: the same in each. All times SLICES ** weight, so that
    an average over the rows is P of weight -1.
    """

    placement: Placement
    weight: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """A value of which that cannot be said since `node`.

    cuts: rows were left out. scaled: the last call that scaled it by a number that grows with the
    batch.
    """

    node: fx.Node
    reason: str
    cuts: bool = False
    scaled: fx.Node | None = None


State = Known | Lost
MIXES = "may mix the rows of a micro-batch"
AVERAGE, SAME = Known(P, -1), Known(R)


def batch_states(part: Program, whole: Program) -> tuple[dict[fx.Node, State], dict[fx.Node, int]]:
    """Return the state of every node of `whole`, the same model traced with SLICES times the rows.

    And the weights of those that are SAME only if they are counted in the whole batch, not in each
    slice. `part` is the trace of one slice. If the two are not alike node by node, everything that
    depends on the inputs is lost at the first node that differs.
    """
    typer = _Typer(whole)
    differs = _first_difference(part, whole)
    lost = Lost(differs, "is there or not by the number of rows") if differs else None
    if lost:
        typer.inputs = dict.fromkeys(whole.inputs, lost)
        part = whole
    for ours, theirs in zip(part.graph.nodes, whole.graph.nodes, strict=True):
        if ours.op != "output":
            typer.add(theirs, typer.counted(theirs, typer.state(ours, theirs)))
    return typer.states, typer.counts


def _first_difference(part: Program, whole: Program) -> fx.Node | None:
    """Return the first node of `whole` that has not the op and the inputs of that of `part`."""
    ours: list[fx.Node] = list(part.graph.nodes)
    theirs: list[fx.Node] = list(whole.graph.nodes)
    same: dict[fx.Node, fx.Node] = dict(zip(ours, theirs, strict=False))
    for a, b in same.items():
        if a.target != b.target or [same[n] for n in a.all_input_nodes] != b.all_input_nodes:
            return b
    longer = max(ours, theirs, key=len)
    return longer[min(len(ours), len(theirs))] if len(ours) != len(theirs) else None


class _Typer:
    def __init__(self, whole: Program) -> None:
        self.whole = whole
        self.inputs: Mapping[str, State] = dict.fromkeys(whole.inputs, Known(S(0)))
        self.states: dict[fx.Node, State] = {}
        self.grown: set[fx.Node] = set()  # values that are larger for more rows
        self.counts: dict[fx.Node, int] = {}
        placeholders = whole.graph.find_nodes(op="placeholder")
        self.added = {node for node in placeholders if str(node.target) not in whole.inputs}
        self.values = constants.Values(whole.graph_module)
        self.placed: dict[fx.Node, Placement] = {}
        self.orders = RowOrders(self.values, self.placed)

    def add(self, node: fx.Node, state: State) -> None:
        """Keep the state of a node."""
        self.states[node] = state
        self.placed[node] = state.placement if isinstance(state, Known) else R

    def counted(self, node: fx.Node, state: State) -> State:
        """Return what `state` is if sums that inputs alone decide are known of the whole batch."""
        if not _is(state, P) or graph_from_inputs(node, {*self.added, *self.counts}) is None:
            return state
        assert isinstance(state, Known)
        self.counts[node] = state.weight
        return SAME

    def state(self, part: fx.Node, whole: fx.Node) -> State:
        """Return the state of a node from those of its inputs."""
        name = str(whole.target)
        if whole.op == "placeholder":
            given = self.whole.target_counts.items()
            counts = {name: Known(R, -count.weight) for name, count in given} | {SEED: SAME}
            return (dict(self.inputs) | counts)[name]
        if whole.op == "get_attr":
            return SAME if constants.same(part, whole) else self._lost(whole)
        states = [self.states[n] for n in tensor_inputs(whole)]
        lost = [s for s in states if isinstance(s, Lost)]
        forgiving = is_cross_entropy(whole)  # of rows that were mixed, which is told
        worst = max(lost, key=lambda s: s.cuts, default=None)
        dim, shift = _row_dim(part, whole), _shift(part, whole)
        self.grown |= {whole} if dim != -1 else set()
        if worst and (worst.cuts or not forgiving):
            scaled = shift != 0 or any(s.weight for s in states if isinstance(s, Known))
            again = scaled and spec_of(whole.target).scales in ("product", "quotient")
            return replace(worst, scaled=whole) if again else worst
        if whole.target in constants.CREATED and part.args[2:] == whole.args[2:]:
            return SAME
        if dim is None or shift is None:
            return self._lost(whole, "depends on the number of rows")
        try:
            if not lost and self.orders.moves(whole):
                return Known(S(0))
        except RowsMix:
            return Lost(whole, MIXES)
        call = as_call(whole)
        placed = [s.placement if isinstance(s, Known) else None for s in states]
        return (
            self._affine(whole, states, shift)
            or self._by_rules(call, placed, states, dim, shift)
            or self._constant(part, whole, states, dim)
            or worst
            or self._lost(whole)
        )

    def _affine(self, node: fx.Node, states: list[State], shift: int) -> State | None:
        """A sum over slices plus what is the same in each."""
        if spec_of(node.target).scales != "affine" or not any(_is(s, P) for s in states):
            return None
        weights = {s.weight - (not _is(s, P)) for s in states if isinstance(s, Known)}
        if len(states) == 1 and any(constants.numbers(node)):  # it adds a number
            weights.add(shift - 1)
        whole = all(_is(s, P) or _is(s, R) for s in states)
        return Known(P, weights.pop()) if whole and len(weights) == 1 else None

    def _by_rules(
        self,
        call: Call,
        placed: list[Placement | None],
        states: list[State],
        dim: int,
        shift: int,
    ) -> State | None:
        wanted = _wanted(call, placed, dim)
        if dim < 0 and len({p.segments for p in placed if p and p.is_shard}) == 1:
            placed = [S(p.dim) if p and p.is_shard else p for p in placed]  # all are added up
        weight = _weight(call.target, states, shift)
        if weight is None:
            return None
        shrinks = dim < 0 and not self.grown.isdisjoint(tensor_inputs(call.node))
        for inputs, output, further in local_strategies(call, wanted, self.values):
            if output == R and shrinks:
                continue  # of a constant with rows, which are other ones in each slice
            if self._fits(call, placed, inputs):
                return Known(output, weight + further)
        return None

    def _fits(
        self, call: Call, placed: list[Placement | None], needed: tuple[Placement, ...]
    ) -> bool:
        pairs = zip(tensor_inputs(call.node), placed, needed, strict=True)
        return all(self._is_placed(node, has, needs) for node, has, needs in pairs)

    def _is_placed(self, node: fx.Node, has: Placement | None, needs: Placement) -> bool:
        if has is None or has == needs:  # None: lost, and forgiven
            return has == needs or needs.is_shard
        return has == R and needs.is_shard and self.values.is_uniform(node, needs.dim)

    def _constant(
        self, part: fx.Node, whole: fx.Node, states: list[State], dim: int
    ) -> State | None:
        """What no input reaches is the same in every slice, whatever its size."""
        shrinks = dim < 0 and not self.grown.isdisjoint(tensor_inputs(whole))
        same = all(s == SAME for s in states) and not shrinks
        return SAME if same and (states or constants.same_call(part, whole)) else None

    def _lost(self, node: fx.Node, reason: str = "") -> Lost:
        """Return what is known of a call whose result is not."""
        known = {n: s for n in tensor_inputs(node) if isinstance(s := self.states[n], Known)}
        sums = [n for n, s in known.items() if s.placement == P]
        cuts = spec_of(node.target).cuts and any(s.placement.is_shard for s in known.values())
        words = {  # the first that holds tells most
            "averages over the targets, or class weights, of one micro-batch": (
                is_cross_entropy(node) and as_call(node).named("reduction") == MEAN
            ),
            reason: bool(reason),
            f"is not linear in {sums[-1] if sums else ''}, a sum over one micro-batch's rows": sums,
            "takes some rows of a micro-batch, not of the batch": cuts,
            MIXES: True,
        }
        return Lost(node, next(word for word, holds in words.items() if holds), cuts)


def is_cross_entropy(node: fx.Node) -> bool:
    """Whether a call is a cross entropy, of class numbers or of probabilities."""
    return spec_of(node.target).batch_rule is of_tokens


def local_strategies(
    call: Call, wanted: frozenset[Placement], values: constants.Values
) -> Iterator[tuple[tuple[Placement, ...], Placement, int]]:
    """Yield the ways to compute a call slice by slice, without an op that talks over the axis.

    As a batch rule does: placements of inputs and result, and the weight it gains.
    """
    spec = spec_of(call.target)
    for way in spec.batch_rule(call, wanted, values) if spec.batch_rule else ():
        if way[1] in {*wanted, P, R}:
            yield way
    found = strategies(call, wanted)
    if spec.rule is None and torch.Tag.pointwise in getattr(call.target, "tags", ()):
        found += pointwise(call, wanted)
    for strategy in found:
        if strategy.output in wanted:
            target, *_ = localize(call, strategy, call.axis.name)
            if target in (call.target, partial_mean):
                yield *strategy, -(target is partial_mean)


def _is(state: State | None, placement: Placement) -> bool:
    return isinstance(state, Known) and state.placement == placement


def as_call(node: fx.Node, axis: MeshAxis = BATCH) -> Call:
    """Return a call of a program that no axis was sharded in yet, on the axis of slices."""
    return global_call(node, axis)


def _row_dim(part: fx.Node, whole: fx.Node) -> int | None:
    """Return the one dimension that grows with the batch, -1 if none does, None otherwise."""
    if not isinstance(whole.meta["val"], Tensor):
        return None
    sizes = list(zip(part.meta["val"].shape, whole.meta["val"].shape, strict=True))
    grown = [dim for dim, (ours, theirs) in enumerate(sizes) if ours != theirs]
    if not grown:
        return -1
    ours, theirs = sizes[grown[0]]
    return grown[0] if len(grown) == 1 and theirs == SLICES * ours else None


def _shift(part: fx.Node, whole: fx.Node) -> int | None:
    """Return by which power of SLICES the numbers in a call grow with the batch."""
    spec = spec_of(whole.target)
    if spec.sized or not whole.all_input_nodes:
        return 0
    ours, theirs = (constants.numbers(n) for n in (part, whole))
    if ours == theirs:
        return 0
    if spec.scales in ("", "linear") or len(ours) != 1 or not ours[0]:
        return None
    ratio = theirs[0] / ours[0]
    power = round(log2(ratio) / log2(SLICES)) if ratio > 0 else 0
    return power if abs(ratio / SLICES**power - 1) < 1e-6 else None


def _weight(target: Any, states: list[State], shift: int) -> int | None:
    """Return the weight of an op's result; None if no power of SLICES comes out of it."""
    scales = spec_of(target).scales
    weights = [s.weight if isinstance(s, Known) else 0 for s in states]
    if scales == "product":
        return sum(weights) + shift
    if scales == "quotient":
        return weights[0] - sum(weights[1:]) - shift
    if scales and shift == 0:
        return weights[0] if len(set(weights)) == 1 else None
    return 0 if not any(weights) and shift == 0 else None


def _wanted(call: Call, placed: list[Placement | None], dim: int) -> frozenset[Placement]:
    """Return the ways a result can lie whose dimension `dim` grows with the batch."""
    if dim < 0:
        return frozenset({R, P})
    size = call.shape[dim]
    outer = {1, *(n for shape in call.shapes for n in accumulate(shape, mul))}
    cut = {S(dim, (size // n,) * n) for n in outer if n and size % (n * SLICES) == 0}
    return frozenset(cut | {p.along(dim) for p in placed if p is not None and p.is_shard})
