"""What each op of torch.export's graphs becomes in the project's dialect, one function per family.

A lowering emits the calls that stand for a node and returns the last of them, or a list of values
for an op that returns a list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ilm_compile.errors import TraceError
from ilm_compile.program.arguments import named
from ilm_compile.program.counts import count_classes
from ilm_compile.program.users_line import source_of

aten = torch.ops.aten
Emit = Callable[..., fx.Node]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Lowering = Callable[[Emit, fx.Node, Args, Kwargs], Any]


def _input(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    return args[0]


def _nothing(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    return None


def _to_size(target: Any) -> Lowering:
    def lower(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
        sizes = list(node.meta["val"].shape)
        is_so = sizes == list(args[0].meta["val"].shape)
        return args[0] if is_so else emit(node, target, (args[0], sizes))

    return lower


_reshape, _expand = map(_to_size, (aten.reshape.default, aten.expand.default))


def _cast(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    dtype = node.meta["val"].dtype
    if args[0].meta["val"].dtype == dtype:
        return args[0]
    return emit(node, aten.to.dtype, (args[0], dtype))


def _copy(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """What ``y[:, 0] = x`` writes: x in the shape and dtype of its place; copy has no backward."""
    x, val = args[1], node.meta["val"]
    if x.meta["val"].dtype != val.dtype:
        cast = x.meta["val"].new_empty(x.meta["val"].shape, dtype=val.dtype)
        x = emit(node, aten.to.dtype, (x, val.dtype), val=cast)
    return _expand(emit, node, (x,), {})


def _pieces(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """Split, chunk and unbind as slices and selects, one per piece."""
    x = args[0]
    dim = named(node.target, args, kwargs, "dim") % x.meta["val"].dim()
    pieces, start = [], 0
    for val in node.meta["val"]:
        end = start + val.shape[dim]
        pieces.append(emit(node, aten.slice.Tensor, (x, dim, start, end), val=val))
        start = end
    return pieces


def _slice(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    if node.meta["val"].shape == args[0].meta["val"].shape and (len(args) < 5 or args[4] == 1):
        return args[0]
    return emit(node, node.target, args, kwargs)


def _transpose(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    order = list(reversed(range(args[0].meta["val"].dim())))
    return emit(node, aten.permute.default, (args[0], order))


def _histc(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    # Of integers it exists on CUDA only; the model was traced on neither device.
    val = node.meta["val"]
    if val.is_floating_point():
        return emit(node, node.target, args, kwargs)
    x = args[0].meta["val"]
    real = emit(node, aten.to.dtype, (args[0], torch.float32), val=x.float())
    counts = emit(node, node.target, (real, *args[1:]), kwargs, val.float())
    return emit(node, aten.to.dtype, (counts, val.dtype), val=val)


def _bincount(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    weights = named(node.target, args, kwargs, "weights")
    return emit(node, count_classes, (args[0], weights, node.meta["val"].shape[0]))


def _cat(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """Without the empty vectors that torch lets pass among tensors of any rank."""
    rank = node.meta["val"].dim()
    kept = [x for x in args[0] if x.meta["val"].dim() == rank]
    if len(kept) == 1:
        return kept[0]
    return emit(node, node.target, (kept, *args[1:]), kwargs)


def _embedding(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """Without ``sparse``, which is the form of the gradient and not its value."""
    if named(node.target, args, kwargs, "scale_grad_by_freq"):
        raise TraceError(
            "trace: an embedding with scale_grad_by_freq divides its gradient by the counts of "
            f"one micro-batch ({source_of(node)}), which is another gradient than that of the "
            "whole batch. Leave it out"
        )
    padding = named(node.target, args, kwargs, "padding_idx")
    return emit(node, node.target, args[:2] if padding == -1 else (*args[:2], padding))


def _broadcast(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    expanded = []
    for x, val in zip(args[0], node.meta["val"], strict=True):
        same = x.meta["val"].shape == val.shape
        call = (x, list(val.shape))
        expanded.append(x if same else emit(node, aten.expand.default, call, val=val))
    return expanded


def _unbind(emit: Emit, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    x = args[0]
    dim = named(node.target, args, kwargs, "dim") % x.meta["val"].dim()
    return [
        emit(node, aten.select.int, (x, dim, index), val=val)
        for index, val in enumerate(node.meta["val"])
    ]


_RESHAPES = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int),
    *(aten.flatten.using_ints, aten.view_as.default, aten.reshape_as.default),
)
_EXPANDS = (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
_CASTS = (
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other),
    *(aten._to_copy.default, aten.type_as.default),
)
_SPLITS = (
    *(aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default),
)
LOWERINGS: dict[Any, Lowering] = {
    aten._assert_tensor_metadata.default: _nothing,
    aten.alias.default: _input,
    aten.lift_fresh_copy.default: _input,
    aten.copy.default: _copy,
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_EXPANDS, _expand),
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_SPLITS, _pieces),
    aten.cat.default: _cat,
    aten.embedding.default: _embedding,
    aten.broadcast_tensors.default: _broadcast,
    aten.unbind.int: _unbind,
    aten.histc.default: _histc,
    aten.bincount.default: _bincount,
    aten.slice.Tensor: _slice,
    aten.numpy_T.default: _transpose,
}
