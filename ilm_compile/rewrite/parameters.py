"""Changing parameters: a pass merges, splits or reshapes weights of the model, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, fx, nn

from ilm_compile.errors import ProgramError
from ilm_compile.program.attributes import put_tensor
from ilm_compile.program.parameter_map import ParameterMap, Tensors
from ilm_compile.program.program import Program, Variable
from ilm_compile.program.users_line import defined_at

WHAT = "replace_parameters"


class Named(Protocol):
    """A pass, as far as it matters here."""

    name: ClassVar[str]


def replace_parameters(
    program: Program,
    made_by: Named,
    sources: Sequence[str],
    forward: Callable[[Tensors], Tensors],
    backward: Callable[[Tensors], Tensors],
) -> dict[str, fx.Node]:
    """Put new parameters in the place of `sources` and return their nodes by name.

    forward: full tensors by the names in `sources` to full tensors by new names; linear, and
    traced here for shapes and dtypes. backward: its inverse, which gives weights back to the user.
    The caller then rewires every use of the old parameters. Works before sharding. Raises
    `ProgramError` for names that are unknown, taken or frozen in part, and if `forward` makes
    nothing of them.
    """
    old = [_source(program, made_by, name) for name in sources]
    if len({(v.dtype, v.requires_grad) for v in old}) != 1:
        raise ProgramError(
            f"{WHAT}: {made_by.name} makes one of {list(sources)}, which differ in dtype or in "
            "whether they are trained; leave such groups alone"
        )
    meta = {v.name: torch.empty(v.shape, dtype=v.dtype, device="meta") for v in old}
    made = forward(dict(meta))
    if taken := sorted((set(made) & set(program.variables)) - set(meta)):
        raise ProgramError(f"{WHAT}: {made_by.name} makes {taken}, names the model has already")
    _check_inverse(made_by, meta, backward(dict(made)))
    nodes = _nodes(program, sources)
    first = min((node for group in nodes.values() for node in group), key=_order(program))
    new = {name: _insert(program, name, value, old[0], first) for name, value in made.items()}
    targets = {name: variable for name, (variable, _) in new.items()}
    program.variables = _replaced(program.variables, list(sources), targets)
    program.parameter_maps.append(
        ParameterMap(made_by.name, tuple(old), tuple(made), forward, backward)
    )
    return {name: node for name, (_, node) in new.items()}


def _source(program: Program, made_by: Named, name: str) -> Variable:
    if "sharded" in program.facts:
        raise ProgramError(
            f'{WHAT}: the program is sharded already; give {made_by.name} before = {{"sharded"}}'
        )
    variable = program.variables.get(name)
    if variable is None or not variable.is_parameter:
        raise ProgramError(f"{WHAT}: {made_by.name} names {name}, which is no parameter")
    if variable.gradient_hooks:
        raise ProgramError(
            f"{WHAT}: {made_by.name} puts another parameter in the place of {name}, which has a "
            f"gradient hook, {defined_at(variable.gradient_hooks[0].function)}; remove the hook, "
            "or leave this parameter alone"
        )
    return variable


def _check_inverse(made_by: Named, meta: Tensors, returned: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(value.shape) for name, value in meta.items()}
    got = {name: tuple(value.shape) for name, value in returned.items()}
    if got != expected:
        raise ProgramError(
            f"{WHAT}: the way back of {made_by.name} must give {expected}, it gives {got}"
        )


def _nodes(program: Program, names: Sequence[str]) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {name: [] for name in names}
    for node in program.graph.find_nodes(op="get_attr"):
        if node.target in found:
            found[str(node.target)].append(node)
    if not any(found.values()):
        raise ProgramError(f"{WHAT}: nothing in the program uses {list(names)}")
    return found


def _order(program: Program) -> Callable[[fx.Node], int]:
    positions = {node: index for index, node in enumerate(program.graph.nodes)}
    return positions.__getitem__


def _insert(
    program: Program, name: str, value: Tensor, like: Variable, before: fx.Node
) -> tuple[Variable, fx.Node]:
    variable = Variable(
        name=name,
        shape=tuple(value.shape),
        dtype=value.dtype,
        is_parameter=True,
        requires_grad=like.requires_grad,
    )
    meta = nn.Parameter(torch.empty_like(value), requires_grad=like.requires_grad)
    put_tensor(program.graph_module, name, meta)
    with program.graph.inserting_before(before):
        node = program.graph.get_attr(name)
    node.meta.update({k: v for k, v in before.meta.items() if k != "val"}, val=meta.detach())
    return variable, node


def _replaced(
    variables: Mapping[str, Variable], sources: list[str], targets: Mapping[str, Variable]
) -> dict[str, Variable]:
    """Return `variables` with `targets` at the place of the first of `sources`."""
    result: dict[str, Variable] = {}
    for name, variable in variables.items():
        if name == sources[0]:
            result.update(targets)
        elif name not in sources:
            result[name] = variable
    return result
