"""Where a program rounds: nowhere but the model does, and for the products of a compute dtype.

The proof runs in float64, where a cast rounds nothing. An error budget
(`ilm_compile.proof.precision`) finds what is rounded far too much; a value that is rounded once
more beside a product is within it, and is found here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ilm_compile.errors import ProgramError
from ilm_compile.ops.nodes import called_name
from ilm_compile.ops.precision import BF16
from ilm_compile.ops.spec import spec_of
from ilm_compile.passes.master_weights import is_master
from ilm_compile.program.layout import layout_of
from ilm_compile.program.program import Program, Variable
from ilm_compile.program.values import tensors_of
from ilm_compile.rewrite.parameter_free import parameter_free_nodes, precision_of

CAST = torch.ops.aten.to.dtype
ROWS = {"aten::embedding", "vocab_embedding", "redistribute"}  # what a table's rows go through


def check_dtypes(traced: Program, program: Program) -> None:
    """Raise `ProgramError` if `program` rounds where neither `traced` nor its compute dtype asks.

    Without a compute dtype, values of both graphs, by name, must have one dtype, and other calls
    must give no fewer digits than they are given. With one, the casts that the model lacks must be
    of what a table was looked up for, or be read by products alone; what no parameter reaches keeps
    its dtype.
    """
    is_rounded = program.plan.dtype is not None or "cast" in program.facts
    known = {node.name: _dtypes(node) for node in traced.calls()}
    free = parameter_free_nodes(program) if is_rounded else set()
    for node in program.calls():
        ours = _dtypes(node)
        if any(is_master(program, *held) for held in _held_by(node, traced)):
            continue
        if node.name in known:
            if (node in free or not is_rounded) and ours != known[node.name]:
                _fail(program, node, f"gives {ours}", f"{known[node.name]}, as in the model")
            continue
        given = [d for source in node.all_input_nodes for d in _dtypes(source)]
        if not given or not ours or _digits(ours) >= _digits(given):
            continue
        if not is_rounded:
            _fail(program, node, f"gives {ours}", f"no fewer digits than its inputs have, {given}")
        elif node.target is CAST and not _is_looked_up(node):
            for reader in _readers(node):
                if precision_of(reader, free).inputs != BF16:
                    found = f"rounds what {called_name(reader)} reads ({reader.name})"
                    _fail(program, node, found, "products alone to read what is rounded for them")


def _held_by(node: fx.Node, traced: Program) -> Iterator[tuple[str, Variable]]:
    """Yield the parameter that a cast, or the rows of a table, are of, as the model has it.

    A cast must give back the model's dtype.
    """
    if not (node.target is CAST or called_name(node) in ROWS):
        return
    source = node.all_input_nodes[0]
    while called_name(source) in ROWS:
        source = source.all_input_nodes[0]
    variable = traced.variables.get(str(source.target)) if source.op == "get_attr" else None
    if variable is not None and (node.target is not CAST or node.args[1] == variable.dtype):
        yield str(source.target), variable


def _dtypes(node: fx.Node) -> list[torch.dtype]:
    values = tensors_of(node.meta.get("val"))
    return [value.dtype for value in values if value.is_floating_point()]


def _digits(dtypes: list[torch.dtype]) -> float:
    return max(-torch.finfo(dtype).eps for dtype in dtypes)


def _is_looked_up(cast: fx.Node) -> bool:
    """Whether `cast` rounds the rows of a table, as the table of precisions asks.

    Rows of a table whose parts lie on several ranks are rounded once they are whole: after what is
    linear in the parts.
    """
    pending = list(cast.all_input_nodes)
    while pending:
        node = pending.pop()
        if node.op == "call_function" and precision_of(node, ()).result == BF16:
            return True
        if spec_of(node.target).carries or layout_of(node).is_partial:
            pending += node.all_input_nodes
    return False


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the calls that read `node`, at once or after it was moved about."""
    for user in node.users:
        if spec_of(user.target).carries:
            yield from _readers(user)
        elif user.op == "call_function":
            yield user


def _fail(program: Program, node: fx.Node, found: str, expected: str) -> None:
    raise ProgramError(
        f"{program.where(node)} {found}; expected {expected}: the plan's compute dtype is "
        f"{program.plan.dtype}, and nothing else may be rounded that the model does not round"
    )
