"""The losses of nearly all models, known from one trace to be averages over micro-batches.

That is a mean cross entropy, or a sum of them, in a model that keeps rows apart: by the rules of
its ops every value has the rows along dimension 0, and what moves them puts them back. What looks
otherwise is looked at more closely.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from ilm_compile.ops.batch_constants import CREATED, Values
from ilm_compile.ops.call import aten, tensor_inputs
from ilm_compile.ops.experts import COUNTS
from ilm_compile.program.layout import MeshAxis
from ilm_compile.program.loss import NUM_TARGETS, cross_entropy_arguments
from ilm_compile.program.placement import P, Placement, R, S
from ilm_compile.program.program import Program
from ilm_compile.program.reductions import SUM
from ilm_compile.sharding.batch_axis import as_call, is_cross_entropy, local_strategies
from ilm_compile.sharding.row_orders import RowOrders, RowsMix

ROWS = S(0)


def is_plain(program: Program) -> bool:
    """Whether the loss of `program`, as traced, is a sum of mean cross entropies of single rows.

    One row does not tell: a dimension of size 1 may be that of the rows or another.
    """
    rows = next(iter(program.inputs.values())).shape[0]
    is_mean = rows > 1 and _is_mean_cross_entropy(program.outputs[0])
    return is_mean and _Rows(program, rows).stay_apart()


def _is_mean_cross_entropy(node: fx.Node) -> bool:
    inputs = tensor_inputs(node)
    if len(inputs) != 2:
        return False
    if node.target is aten.add.Tensor:
        return all(map(_is_mean_cross_entropy, inputs))
    loss, count = inputs
    counts = count.op == "placeholder" and str(count.target).startswith(NUM_TARGETS)
    is_sum = (
        loss.target is aten.cross_entropy_loss.default and SUM == (cross_entropy_arguments(loss)[1])
    )
    return node.target is aten.div.Tensor and is_sum and counts


class _Rows:
    def __init__(self, program: Program, rows: int) -> None:
        self.program = program
        self.placed: dict[fx.Node, Placement] = {}
        self.orders = RowOrders(Values(program.graph_module), self.placed)
        self.repeated: dict[fx.Node, bool] = {}
        self.known: dict[str, Placement | None] = {}  # by what a call is but for its names
        self.axis = MeshAxis("batch", {"batch": rows})

    def stay_apart(self) -> bool:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.placed[node] = ROWS if node.target in self.program.inputs else R
            elif node.op != "call_function" or node.target in CREATED:
                self.placed[node] = R
            else:
                found = self._result(node)
                if found is None:
                    return False
                self.placed[node] = found
        return True

    def _result(self, node: fx.Node) -> Placement | None:
        """Return how the rows lie in the result of a call; None if that takes a closer look."""
        inputs = tensor_inputs(node)
        if all(self.placed[n] == R for n in inputs):
            return R
        try:
            if self.orders.moves(node):
                return ROWS
        except RowsMix:
            return None
        if not isinstance(node.meta["val"], Tensor):
            return None
        key = repr((node.target, fx.node.map_arg((node.args, node.kwargs), self._seen)))
        if key not in self.known:
            self.known[key] = self._by_rules(node)
        return self.known[key]

    def _seen(self, node: fx.Node) -> Any:
        """All that tells of an input; of a constant that may be its values too."""
        name = node.name if self.placed[node] == R and node.op != "get_attr" else ""
        return (tuple(node.meta["val"].shape), str(self.placed[node]), name)

    def _by_rules(self, node: fx.Node) -> Placement | None:
        given = tensor_inputs(node)
        sums = is_cross_entropy(node) or node.target in COUNTS
        sums |= any(self.placed[n] == P for n in given)
        for inputs, output in self._ways(node):
            if all(map(self._lies, given, inputs)) and (output == ROWS or sums):
                return output
        return None

    def _ways(self, node: fx.Node) -> Iterator[tuple[tuple[Placement, ...], Placement]]:
        call = as_call(node, self.axis)
        wanted = frozenset({ROWS, P} if call.shape else {P})
        for inputs, output, _ in local_strategies(call, wanted, self.orders.values):
            if output in wanted:
                yield inputs, output

    def _lies(self, node: fx.Node, needed: Placement) -> bool:
        has = self.placed[node]
        return has == needed or (has == R and needed == ROWS and self._repeats(node))

    def _repeats(self, node: fx.Node) -> bool:
        """Whether each row of a value that no input reaches is the same."""
        if node not in self.repeated:
            given = tensor_inputs(node)
            self.repeated[node] = self.orders.values.is_uniform(node, 0) or any(
                output == ROWS and given and all(map(self._lies, given, inputs))
                for inputs, output in (self._ways(node) if node.op == "call_function" else ())
            )
        return self.repeated[node]
