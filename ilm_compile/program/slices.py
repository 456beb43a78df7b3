"""What a loss needs so that its average over micro-batches is the loss of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import fx

from ilm_compile.program.input_graph import graph_from_inputs, reached
from ilm_compile.program.loss import (
    add_count,
    counting_dtype,
    find_value,
    insert_after,
    num_slices,
)
from ilm_compile.program.program import Count, Program

aten = torch.ops.aten
TOTAL = "batch_total"  # the placeholders of what is counted, the first one's name
Use = tuple[fx.Node, fx.Node]  # a value, and the call that takes it, or the output


def count_in_batch(program: Program, uses: Mapping[Use, int]) -> None:
    """Give `uses` of sums over rows that inputs alone decide the value in the whole batch.

    Which is the sum over all slices times num_slices ** weight, the weight being given by use.
    """
    dtype, made = counting_dtype(program.variables.values()), dict[fx.Node, fx.Node]()
    for (node, user), weight in uses.items():
        if node not in made:
            graph, val = graph_from_inputs(node), node.meta["val"]
            assert graph is not None, "it depends on inputs alone"
            kind = dtype if val.is_floating_point() else torch.int64
            made[node] = add_count(program, TOTAL, Count(graph, weight), val.shape, kind)
        user.replace_input_with(node, made[node])
    if made:
        words = ", ".join(map(program.where, made))
        program.decisions.append(f"loss: counted in the whole batch before each step: {words}")
        _renew(program, made.values())
        program.finish()


def average_sums(program: Program, terms: Mapping[Use, int]) -> None:
    """Multiply each term of the loss that is a sum over slices, so that it is their average.

    terms: by use the weight of a sum times num_slices ** weight.
    """
    for (term, user), weight in terms.items():
        scaled, slices = term, num_slices(program)
        for _ in range(abs(weight + 1)):
            target = aten.mul.Tensor if weight >= 0 else aten.div.Tensor
            scaled = insert_after(scaled, target, (scaled, slices))
        if user.op == "output":
            user.args = ((scaled, *program.outputs[1:]),)
        else:
            user.replace_input_with(term, scaled)
    if terms:
        program.finish()


def sources(
    nodes: Iterable[fx.Node], keep: Callable[[fx.Node], bool] = lambda node: True
) -> set[fx.Node]:
    """Return all that `nodes` need, themselves included, as far as it is reached through `keep`."""
    return set(reached(filter(keep, nodes), lambda node: filter(keep, node.all_input_nodes)))


def _renew(program: Program, changed: Collection[fx.Node]) -> None:
    """Compute dtypes anew that follow from those of `changed`."""
    stale = set(changed)
    for node in program.calls():
        if stale.isdisjoint(node.all_input_nodes):
            continue
        dtype = node.meta["val"].dtype
        find_value(node)
        if node.meta["val"].dtype != dtype:
            stale.add(node)
