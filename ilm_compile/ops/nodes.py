"""What rules ask of a node of an ATen graph: its op, its tensors, their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.program.values import tensors_of

# Typed as returning an alias, but copying what cannot be viewed.
_COPIES_STRIDED = {"aten::reshape", "aten::contiguous", "aten::flatten"}


def op_name(node: fx.Node) -> str:
    """Return the name of the op a node calls, such as ``aten::linear``; empty if it calls none.

    Python functions (collectives among them), placeholders and attributes have no op.
    """
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def called_name(node: fx.Node) -> str:
    """Return the op's name, such as ``aten::linear``, or that of the python function."""
    return op_name(node) or str(getattr(node.target, "__name__", node.target))


def shape_of(argument: Any) -> Sequence[int]:
    """Return the shape of what a node, given as an argument of another, holds."""
    shape: Sequence[int] = argument.meta["val"].shape
    return shape


def tensor_bytes(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a dense copy of `tensor`, held in `dtype` if it is floating-point."""
    is_cast = dtype is not None and tensor.is_floating_point()
    return tensor.numel() * (dtype if is_cast and dtype else tensor.dtype).itemsize


def value_bytes(node: fx.Node, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of all tensors that a node produces."""
    return sum(tensor_bytes(tensor, dtype) for tensor in tensors_of(node.meta.get("val")))


def rewrites_input(node: fx.Node) -> int:
    """Return the bytes of reading the first input and writing as much."""
    return 2 * value_bytes(node.all_input_nodes[0])


def rewrites_result(node: fx.Node) -> int:
    """Return the bytes of reading as much as is written."""
    return 2 * value_bytes(node)


def is_view(node: fx.Node) -> bool:
    """Return whether a node moves no data: its output aliases its input, by the op's schema."""
    if not op_name(node):
        return False
    returns = node.target._schema.returns  # type: ignore[union-attr]
    aliases = [r.alias_info for r in returns if r.alias_info is not None]
    if not aliases or any(alias.is_write for alias in aliases):
        return False
    source = node.all_input_nodes[0].meta["val"]
    if any(result.dtype != source.dtype for result in tensors_of(node.meta["val"])):
        return False  # aten::to returns an alias only if it has nothing to do
    return op_name(node) not in _COPIES_STRIDED or source.is_contiguous()
