"""What the searches for fused ops share: reading calls, and putting one op in the place of many."""

from __future__ import annotations

import operator
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ilm_compile.program.program import Program
from ilm_compile.program.values import take_name
from ilm_compile.rewrite.edit import insert_before

aten, ilm = torch.ops.aten, torch.ops.ilm
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Left:
    """A place that looks like a fused op and stays as it is: which op, where and why."""

    op: str
    node: fx.Node
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a search did: the fused ops, and the near misses."""

    fused: tuple[fx.Node, ...]
    left: tuple[Left, ...]


def is_call(node: Any, *targets: Any) -> bool:
    """Whether `node` is a call of one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def args(node: Any) -> Any:
    """Return the arguments of a call, which torch.fx types as any of twenty kinds."""
    return node.args


def shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's value."""
    return tuple(node.meta["val"].shape)


def dtype(node: fx.Node) -> torch.dtype:
    """Return the dtype of a node's value."""
    found: torch.dtype = node.meta["val"].dtype
    return found


def only_user(node: fx.Node) -> Any:
    """Return who uses `node`, None if it is not one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def other_operand(call: Any, known: Any) -> Any:
    """Return the operand beside `known` of a sum or product of two."""
    first, second = args(call)[:2]
    return second if first is known else first


def is_mutated(node: fx.Node) -> bool:
    """Whether a call writes into the value of `node`."""
    schemas = (getattr(user.target, "_schema", None) for user in node.users)
    return any(schema is not None and schema.is_mutable for schema in schemas)


def fuse(
    program: Program,
    op: Any,
    arguments: Sequence[Any],
    results: Sequence[fx.Node | None],
    *,
    point: fx.Node,
    turned: bool = False,
    unlike: Container[fx.Node] = (),
) -> fx.Node:
    """Put ``op(*arguments)`` before `point` for those who use `results`, and return the call.

    What replaces a result keeps its name, by which the proof knows it; not so those of `unlike`,
    which have other values that serve as well. A result that replaces None is not used. turned:
    dims 1 and 2 of each result change places, for a graph that has the heads before the tokens.
    What nobody uses any more is erased.
    """
    call = insert_before(program, point, op, *arguments)
    is_one = isinstance(call.meta["val"], torch.Tensor)
    for index, old in enumerate(results):
        if old is None:
            continue
        new = call if is_one else insert_before(program, point, operator.getitem, call, index)
        if turned:
            new = insert_before(program, point, aten.transpose.int, new, 1, 2)
        if old not in unlike:
            take_name(new, old)
        old.replace_all_uses_with(new)
    _erase_unused([old for old in results if old is not None])
    return call


def _erase_unused(nodes: list[fx.Node]) -> None:
    """Erase calls that nobody uses, and then those that only they used."""
    pending, erased = list(nodes), set[fx.Node]()
    while pending:
        node = pending.pop()
        if node.op == "call_function" and not node.users and node not in erased:
            pending += node.all_input_nodes
            erased.add(node)
            node.graph.erase_node(node)


def comes_before_users(point: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    """Whether everyone who uses `nodes` stands after `point`, or is `point`."""
    return all(not user < point for node in nodes for user in node.users)
