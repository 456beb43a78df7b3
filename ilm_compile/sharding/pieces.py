"""Loops over pieces of a batch, as one call over all of it.

A loss that is summed up over pieces of the logits has as many calls as there are pieces: twice the
rows are another graph. The same call on each piece of a value is one call on the whole if the rules
say so; then the sum over the pieces is its result. Autograd keeps as much for the one call as for
all the pieces.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ilm_compile.ops.batch_constants import Values
from ilm_compile.ops.call import Call, aten, tensor_inputs
from ilm_compile.ops.spec import spec_of
from ilm_compile.ops.strategy import global_call, localize, strategies
from ilm_compile.ops.views import slice_bounds
from ilm_compile.program.layout import MeshAxis
from ilm_compile.program.loss import insert_after
from ilm_compile.program.placement import P, Placement, R, S
from ilm_compile.program.program import Program

ONE = MeshAxis("piece", {"piece": 1})


@dataclass(frozen=True, slots=True)
class Piece:
    """Some pieces of `whole`: cut along S(dim), or parts of a sum, P, with `base` added to it.

    ends: where each of all pieces ends; held: the numbers of these.
    """

    whole: fx.Node
    place: Placement
    ends: tuple[int, ...]
    held: frozenset[int]
    base: Any = None


def join_pieces(program: Program) -> None:
    """Replace what is computed piece by piece, and put together again, by calls on the whole."""
    run = _Joiner(program)
    for node in [n for n in program.graph.nodes if n.op in ("placeholder", "call_function")]:
        run.cut(node)
    run.work()
    program.finish()


class _Joiner:
    def __init__(self, program: Program) -> None:
        self.pieces: dict[fx.Node, Piece] = {}
        self.groups: dict[Any, dict[int, fx.Node]] = defaultdict(dict)
        self.values = Values(program.graph_module)
        self.order = {node: place for place, node in enumerate(program.graph.nodes)}
        self.queue: deque[fx.Node] = deque()

    def cut(self, whole: fx.Node) -> None:
        """Mark slices that make up `whole`, side by side."""
        found: dict[int, dict[int, tuple[int, fx.Node]]] = defaultdict(dict)
        for user in whole.users:
            if user.target is aten.slice.Tensor:
                dim, start, end, step = slice_bounds(global_call(user, ONE))
                if step == 1 and end < found[dim].get(start, (end + 1,))[0]:
                    found[dim][start] = end, user
        for dim, slices in found.items():
            chain, end = list[fx.Node](), 0
            while end in slices:
                end, node = slices[end]
                chain.append(node)
            if end == whole.meta["val"].shape[dim] and len(chain) > 1:
                ends = tuple(slice_bounds(global_call(node, ONE))[2] for node in chain)
                self.mark(whole, S(dim), ends, chain)

    def mark(
        self, whole: fx.Node, place: Placement, ends: tuple[int, ...], nodes: list[fx.Node]
    ) -> None:
        for number, node in enumerate(nodes):
            self.pieces[node] = Piece(whole, place, ends, frozenset({number}))
            self.queue.extend(node.users)

    def work(self) -> None:
        while self.queue:
            node = self.queue.popleft()
            if node.op != "call_function" or node in self.pieces:
                continue
            if node.target is aten.add.Tensor and self.added(node):
                continue
            if node.target is aten.cat.default and self.put_together(node):
                continue
            self.grouped(node)

    def added(self, node: fx.Node) -> bool:
        """Put parts of one sum together; all of them are the sum."""
        terms = [self.pieces.get(n, n) if isinstance(n, fx.Node) else n for n in node.args]
        parts = [t for t in terms if isinstance(t, Piece) and t.place == P]
        bases = [t for t in terms if t not in parts and t != 0]  # 0: where Python's sum starts
        bases += [part.base for part in parts if part.base is not None]
        if not parts or node.kwargs or len(bases) > 1 or any(isinstance(b, Piece) for b in bases):
            return False
        held = [number for part in parts for number in part.held]
        if len({part.whole for part in parts}) > 1 or len(set(held)) < len(held):
            return False
        total = replace(parts[0], held=frozenset(held), base=bases[0] if bases else None)
        if len(held) < len(total.ends):
            self.pieces[node] = total
            self.queue.extend(node.users)
            return True
        result = total.whole
        if bases:
            result = insert_after(node, aten.add.Tensor, (total.whole, bases[0]))
        node.replace_all_uses_with(result)
        return True

    def put_together(self, node: fx.Node) -> bool:
        """All pieces of one value, one behind the other, are that value."""
        parts = [self.pieces.get(n) for n in tensor_inputs(node)]
        first = parts[0]
        dim = global_call(node, ONE).argument(1, "dim", 0) % node.meta["val"].dim()
        if first is None or first.place != S(dim):
            return False
        wanted = [replace(first, held=frozenset({i})) for i in range(len(first.ends))]
        if parts == wanted:
            node.replace_all_uses_with(first.whole)
        return parts == wanted

    def grouped(self, node: fx.Node) -> None:
        """Join calls that are the same but for the piece that they are of."""
        taken = [self.pieces.get(n) for n in tensor_inputs(node)]
        cuts = {(p.ends, p.held) for p in taken if p is not None}
        added = any(p and p.base is not None for p in taken)
        if len(cuts) != 1 or spec_of(node.target).sized or added:
            return
        ((ends, held),) = cuts
        if len(held) > 1:
            return

        def of_whole(n: fx.Node) -> fx.Node:
            return self.pieces[n].whole if n in self.pieces else n

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), of_whole)
        places = tuple(R if p is None else p.place for p in taken)
        key = (node.target, str(args), str(kwargs), places, ends)
        group = self.groups[key]
        group.setdefault(min(held), node)
        if len(group) < len(ends):
            return
        nodes = [group[number] for number in range(len(ends))]
        try:
            whole = insert_after(max(nodes, key=self.order.__getitem__), node.target, args, kwargs)
        except RuntimeError:  # it is given something of the size of a piece
            return
        for place in self._results(global_call(whole, ONE), places):
            if all(_shape(n) == _of_piece(whole, place, ends, i) for i, n in enumerate(nodes)):
                self.mark(whole, place, ends, nodes)
                return

    def _results(self, call: Call, places: tuple[Placement, ...]) -> Iterator[Placement]:
        """Yield how the result lies if the inputs lie at `places` and the call is the same."""
        wanted = frozenset({P, *(S(dim) for dim in range(len(call.shape)))})
        if rule := spec_of(call.target).batch_rule:
            found = rule(call, wanted, self.values)
            yield from (
                output for inputs, output, weight in found if inputs == places and not weight
            )
        for strategy in strategies(call, wanted):
            same = localize(call, strategy, ONE.name)[0] is call.target
            if same and strategy.inputs == places and strategy.output in wanted:
                yield strategy.output


def _shape(node: fx.Node) -> list[int]:
    return list(node.meta["val"].shape)


def _of_piece(whole: fx.Node, place: Placement, ends: tuple[int, ...], number: int) -> list[int]:
    shape = _shape(whole)
    if place.is_shard:
        shape[place.dim] = ends[number] - (ends[number - 1] if number else 0)
    return shape
