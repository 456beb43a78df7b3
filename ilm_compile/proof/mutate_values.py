"""Faults of what is computed, in any block: constants, operands, activations, parameters."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import Any

from torch import fx

from ilm_compile.ops.attention import ATTENTION, SDPA
from ilm_compile.program.arguments import argument
from ilm_compile.program.layout import layout_of
from ilm_compile.program.program import Program
from ilm_compile.program.values import shapes_of
from ilm_compile.proof.mutate_places import (
    Kind,
    Place,
    aten,
    calls,
    ilm,
    is_float,
    parameters,
    set_argument,
)
from ilm_compile.rewrite.edit import insert_before

SMALL, LARGE = 1e-3, 1e4  # an epsilon is below the one, what hides by its size above the other
SCALED = (aten.mul.Tensor, aten.div.Tensor)
OTHER = {
    aten.silu.default: aten.gelu.default,
    aten.gelu.default: aten.silu.default,
    aten.relu.default: aten.tanh.default,
    aten.tanh.default: aten.sigmoid.default,
    aten.sigmoid.default: aten.tanh.default,
}


def change_epsilon(program: Program) -> Iterator[Place]:
    """The epsilon of a norm, an argument or added by hand, is doubled."""

    def argument_edit(program: Program, node: fx.Node) -> None:
        set_argument(node, "eps", 2 * (argument(node, "eps") or 1e-6))

    def operand_edit(program: Program, node: fx.Node) -> None:
        node.update_arg(1, 2 * node.args[1])  # type: ignore[operator]

    for node in program.calls():
        if isinstance(eps := argument(node, "eps"), float):
            yield node, f"{eps:g}", argument_edit
        elif node.target is aten.add.Tensor and isinstance(node.args[1], float):
            if 0 < node.args[1] < SMALL:
                yield node, f"{node.args[1]:g}", operand_edit


def double_scale(program: Program) -> Iterator[Place]:
    """The scale of an attention, or a factor or divisor somewhere, is doubled."""

    def attention(program: Program, node: fx.Node) -> None:
        width = node.all_input_nodes[0].meta["val"].shape[-1]
        given = argument(node, "scale")
        set_argument(node, "scale", 2 * (1 / math.sqrt(width) if given is None else given))

    def factor(program: Program, node: fx.Node) -> None:
        node.update_arg(1, 2 * node.args[1])  # type: ignore[operator]

    for node in calls(program, SDPA, ATTENTION, *SCALED):
        if node.target not in SCALED:
            yield node, "of attention", attention
        elif is_float(node) and _is_number(node.args[1]):
            yield node, f"{node.args[1]}", factor


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) < LARGE


def double_cap(program: Program) -> Iterator[Place]:
    """A soft cap, c * tanh(x / c), has twice its c."""

    def edit(program: Program, node: fx.Node) -> None:
        for each in (node.all_input_nodes[0], next(iter(node.users))):
            given: Any = each.args[1]
            inverse = each.target is aten.mul.Tensor and each is node.all_input_nodes[0]
            each.update_arg(1, given / 2 if inverse else 2 * given)

    for node in calls(program, aten.tanh.default):
        around = (node.all_input_nodes[0], next(iter(node.users)))
        if all(each.target in SCALED and _is_number(each.args[1]) for each in around):
            yield node, "", edit


def change_constant(program: Program) -> Iterator[Place]:
    """Another number in a call: the base of rotary frequencies, a bound, a smoothing."""

    def edit(position: int, program: Program, node: fx.Node) -> None:
        value: Any = node.args[position]
        node.update_arg(position, value * 1.5 if value else 0.1)

    for node in program.calls():
        if node.target in (*SCALED, SDPA, ATTENTION) or not hasattr(node.target, "_schema"):
            continue
        if argument(node, "eps") is not None:
            continue
        for position, value in enumerate(node.args):
            is_epsilon = node.target is aten.add.Tensor and isinstance(value, float)
            if isinstance(value, float) and abs(value) < 1e30 and not is_epsilon:
                yield node, f"{value:g}", partial(edit, position)


def shift_slice(program: Program) -> Iterator[Place]:
    """A part is taken one place beside."""

    def edit(by: int, program: Program, node: fx.Node) -> None:
        node.update_arg(2, node.args[2] + by)  # type: ignore[operator]
        node.update_arg(3, node.args[3] + by)  # type: ignore[operator]

    for node in calls(program, aten.slice.Tensor):
        source, dim = node.all_input_nodes[0].meta["val"].shape, node.args[1:2] or (0,)
        if len(node.args) != 4 or not all(isinstance(a, int) and a >= 0 for a in node.args[2:]):
            continue
        start, end = node.args[2], node.args[3]
        if end < source[dim[0]]:
            yield node, "", partial(edit, +1)
        elif end == source[dim[0]] and start:
            yield node, "", partial(edit, -1)


def other_activation(program: Program) -> Iterator[Place]:
    """Another activation function."""

    def edit(program: Program, node: fx.Node) -> None:
        node.args, node.kwargs = node.args[:1], {}
        node.target = OTHER[node.target]  # type: ignore[index]

    def of_gate(program: Program, node: fx.Node) -> None:
        node.args = (*node.args[:2], "gelu" if node.args[2] == "silu" else "silu")

    for node in calls(program, *OTHER):
        yield node, "", edit
    for node in calls(program, ilm.glu.default):
        yield node, "", of_gate


def swap_operands(program: Program) -> Iterator[Place]:
    """The operands of a difference or a gate, or the parts of a concatenation, change places."""

    def pair(program: Program, node: fx.Node) -> None:
        node.args = (node.args[1], node.args[0], *node.args[2:])

    def parts(program: Program, node: fx.Node) -> None:
        node.update_arg(0, list(reversed(node.args[0])))  # type: ignore[arg-type]

    for node in calls(program, aten.sub.Tensor, ilm.glu.default, aten.cat.default):
        given = list(node.args[0] if node.target is aten.cat.default else node.args[:2])  # type: ignore[arg-type]
        same = all(isinstance(each, fx.Node) for each in given) and len(set(given)) == len(given)
        if same and len({each.meta["val"].shape for each in given}) == 1:
            yield node, "", parts if node.target is aten.cat.default else pair


def swap_parameters(program: Program) -> Iterator[Place]:
    """Two parameters of the same shape and placement, each in the place of the other."""
    for first, second in combinations(parameters(program), 2):
        variables = [program.variables[str(n.target)] for n in (first, second)]
        alike = {(v.shape, v.layout) for v in variables}
        apart = set(first.users).isdisjoint(second.users)
        if len(alike) == 1 and apart:
            words = f"{first.target} and {second.target}"
            yield first, words, partial(_swap, str(second.target))


def swap_blocks(program: Program) -> Iterator[Place]:
    """A parameter of one block in the place of the same one of the next, and the other way."""
    found: dict[str, fx.Node] = {}
    for node in parameters(program):
        name = ".".join(p for p in str(node.target).split(".") if not p.isdigit())
        if (other := found.get(name)) is not None and other.meta["val"].shape == node.meta[
            "val"
        ].shape:
            yield other, f"{other.target} and {node.target}", partial(_swap, str(node.target))
        found[name] = node


def _swap(other: str, program: Program, node: fx.Node) -> None:
    first, second = node, next(n for n in parameters(program) if n.target == other)
    users = set(first.users)
    second.replace_all_uses_with(first, delete_user_cb=lambda user: user not in users)
    first.replace_all_uses_with(second, delete_user_cb=users.__contains__)


def drop_residual(program: Program) -> Iterator[Place]:
    """A residual connection lost: a sum gives one of its operands only."""

    def edit(program: Program, node: fx.Node) -> None:
        node.replace_all_uses_with(node.all_input_nodes[1])

    for node in sums(program):
        yield node, "", edit


def sums(program: Program) -> Iterator[fx.Node]:
    """Yield the sums of two values of one shape."""
    for node in calls(program, aten.add.Tensor):
        operands = node.all_input_nodes
        if len(operands) == 2 and len({o.meta["val"].shape for o in operands}) == 1:
            yield node


def drop_fused_residual(program: Program) -> Iterator[Place]:
    """A residual connection lost in a fused op: it is given zeros in the place of one term."""

    def edit(position: int, program: Program, node: fx.Node) -> None:
        term = node.args[position]
        zeros = insert_before(program, node, aten.zeros_like.default, term)
        zeros.meta["layout"] = layout_of(term)  # type: ignore[arg-type]
        node.update_arg(position, zeros)

    for node in calls(program, ilm.add_rms_norm.default, ilm.add_layer_norm.default):
        for position, words in enumerate(("the layer's", "the stream's")):
            yield node, f"{words} term", partial(edit, position)


def take_other_result(program: Program) -> Iterator[Place]:
    """Of an op with several results of one shape, another one."""

    def edit(index: int, program: Program, node: fx.Node) -> None:
        node.update_arg(1, index)

    for node in calls(program, operator.getitem):
        shapes = shapes_of(node.all_input_nodes[0])
        for index, shape in enumerate(shapes):
            if index != node.args[1] and shape == shapes_of(node)[0]:
                yield node, f"{index} in the place of {node.args[1]}", partial(edit, index)


KINDS: dict[str, Kind] = {
    "change an epsilon": change_epsilon,
    "double a scale": double_scale,
    "double a soft cap": double_cap,
    "change a constant": change_constant,
    "shift a slice": shift_slice,
    "use another activation": other_activation,
    "swap operands": swap_operands,
    "swap two parameters": swap_parameters,
    "swap parameters of two blocks": swap_blocks,
    "drop a residual": drop_residual,
    "drop a fused residual": drop_fused_residual,
    "take another result": take_other_result,
}
