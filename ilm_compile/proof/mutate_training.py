"""Faults that no forward pass shows: gradients, dropout, what is trained and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, fx

from ilm_compile.program.dropout import SALT, seeded_dropout
from ilm_compile.program.program import Program, Variable
from ilm_compile.proof.mutate_places import (
    Kind,
    Place,
    aten,
    calls,
    counts,
    differentiable,
    is_float,
    leave_out,
    like,
    parameters,
    rerouted,
    users_of,
    value_of,
)
from ilm_compile.rewrite.edit import insert_before, wrap

FACTORS = (2.0, 1 + 1e-6)  # a doubled gradient, and one that no loss curve would show
RATE = 2  # among the arguments of `seeded_dropout`


def scale_gradient(program: Program) -> Iterator[Place]:
    """The value stays, its gradient is multiplied."""

    def edit(factor: float, program: Program, node: fx.Node) -> None:
        def scaled(x: Tensor) -> Tensor:
            return x * factor - x.detach() * (factor - 1)

        wrap(program, node, scaled)

    for node in parameters(program):
        if program.variables[str(node.target)].requires_grad:
            for factor in FACTORS:
                yield node, f"of {node.target} by {factor:g}", partial(edit, factor)


def forget_gradient(program: Program) -> Iterator[Place]:
    """One use of a parameter adds nothing to its gradient: tied weights, used twice, first."""

    def edit(position: int, program: Program, node: fx.Node) -> None:
        user = users_of(node)[position]
        user.replace_input_with(node, insert_before(program, user, aten.detach.default, node))

    trained = [n for n in parameters(program) if program.variables[str(n.target)].requires_grad]
    for node in sorted(trained, key=lambda node: -len(node.users)):
        for position, user in enumerate(users_of(node)):
            words = f"of {'tied ' if len(node.users) > 1 else ''}{node.target} in {user.name}"
            yield node, words, partial(edit, position)


def cut_gradient(program: Program) -> Iterator[Place]:
    """No gradient goes back through a value inside the model."""
    for node in differentiable(program):
        if len(node.users) < 3 and not _is_split(node):
            yield node, "", rerouted(aten.detach.default)


def _is_split(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def remove_dropout(program: Program) -> Iterator[Place]:
    """Nothing is dropped at one place."""
    for node in calls(program, seeded_dropout):
        yield node, "", leave_out


def change_dropout_rate(program: Program) -> Iterator[Place]:
    """One place drops another share."""

    def edit(rate: float, program: Program, node: fx.Node) -> None:
        node.update_arg(RATE, rate)

    for node in calls(program, seeded_dropout):
        rate = node.args[RATE]
        assert isinstance(rate, float)
        yield node, f"{rate:g} to {rate / 2:g}", partial(edit, rate / 2)


def share_dropout_mask(program: Program) -> Iterator[Place]:
    """One place drops what another one drops."""

    def edit(salt: object, program: Program, node: fx.Node) -> None:
        node.update_arg(SALT, salt)  # type: ignore[arg-type]

    found = calls(program, seeded_dropout)
    for node, other in zip(found, found[1:] + found[:1], strict=True):
        if node is not other:
            yield node, f"that of {other.name}", partial(edit, other.args[SALT])


def _of_variable(
    wanted: Callable[[Variable], bool], change: Callable[[Variable], None]
) -> Callable[[Program], Iterator[Place]]:
    """Return the kind that changes what is known of a parameter or buffer, not the graph."""

    def edit(program: Program, node: fx.Node) -> None:
        change(program.variables[str(node.target)])

    def places(program: Program) -> Iterator[Place]:
        for node in program.graph.find_nodes(op="get_attr"):
            if wanted(program.variables[str(node.target)]):
                yield node, f"of {node.target}", edit

    return places


def _train(variable: Variable) -> None:
    variable.requires_grad = True


def _freeze(variable: Variable) -> None:
    variable.requires_grad = False


def _forget_names(variable: Variable) -> None:
    variable.aliases = ()


def _flip_saved(variable: Variable) -> None:
    variable.persistent = not variable.persistent


def double_output(program: Program) -> Iterator[Place]:
    """An output beside the loss, of which evaluation makes use, is twice what it should be."""
    yield from _outputs(program, aten.mul.Tensor, 2)


def other_output(program: Program) -> Iterator[Place]:
    """An output beside the loss is another value."""
    yield from _outputs(program, aten.neg.default)


def _outputs(program: Program, target: object, *args: object) -> Iterator[Place]:
    def edit(program: Program, node: fx.Node) -> None:
        output = program.graph.output_node()
        output.replace_input_with(node, like(program, node, target, *args)(output))

    for index, node in enumerate(program.outputs):
        if index and is_float(node):
            yield node, program.output_names[index], edit


def scale_target_count(program: Program) -> Iterator[Place]:
    """The loss is divided by twice the number of targets."""
    for node in counts(program):
        yield node, "", rerouted(aten.mul.Tensor, 2)


def drop_target_count(program: Program) -> Iterator[Place]:
    """The loss is a sum over targets."""
    for node in counts(program):
        yield node, "", rerouted(aten.ones_like.default)


def change_buffer(program: Program) -> Iterator[Place]:
    """A buffer, or a constant of the graph, has another value."""
    for node in program.graph.find_nodes(op="get_attr"):
        value = value_of(node)
        if value is None or program.variables[str(node.target)].is_parameter or not node.users:
            continue
        if value.is_floating_point():
            yield node, f"{node.target} times 1.01", rerouted(aten.mul.Tensor, 1.01)
        elif value.dtype is not torch.bool:
            yield node, f"{node.target} plus 1", rerouted(aten.add.Tensor, 1)


KINDS: dict[str, Kind] = {
    "scale a gradient": scale_gradient,
    "forget a gradient (tied)": forget_gradient,
    "cut a gradient": cut_gradient,
    "remove a dropout": remove_dropout,
    "change a dropout rate": change_dropout_rate,
    "share a dropout mask": share_dropout_mask,
    "train a frozen weight": _of_variable(lambda v: v.is_parameter and not v.requires_grad, _train),
    "freeze a weight": _of_variable(lambda v: v.is_parameter and v.requires_grad, _freeze),
    "forget a tied name": _of_variable(lambda v: bool(v.aliases), _forget_names),
    "change whether a buffer is saved": _of_variable(lambda v: not v.is_parameter, _flip_saved),
    "double an output": double_output,
    "give another output": other_output,
    "double the target count": scale_target_count,
    "drop the target count": drop_target_count,
    "change a buffer": change_buffer,
}
