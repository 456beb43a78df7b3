"""From a call on global values to the call on rank-local ones, once its placements are chosen.

Most ops run unchanged on local tensors. The table holds those whose arguments speak of global sizes
or whose sharded form is another op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ilm_compile.ops import attention
from ilm_compile.ops.convolutions import CONVOLUTIONS
from ilm_compile.ops.pointwise import MEANS
from ilm_compile.ops.reductions import LOCAL, LocalCall
from ilm_compile.ops.strategy import Call, Strategy, aten
from ilm_compile.ops.views import slice_bounds
from ilm_compile.program.dropout import seeded_dropout
from ilm_compile.program.layout import Layout
from ilm_compile.program.loss import cross_entropy_arguments
from ilm_compile.program.placement import P
from ilm_compile.program.reductions import partial_mean
from ilm_compile.program.vocab import vocab_cross_entropy, vocab_embedding


def localize(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    """Return (target, args, kwargs) that compute one rank's part of `call` under `strategy`."""
    rewrite = _REWRITES.get(call.target)
    return rewrite(call, strategy, axis) if rewrite else (call.target, call.args, call.kwargs)


def _sizes(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    sizes = list(strategy.output.local_shape(call.shape, call.size))
    return call.target, (call.args[0], sizes, *call.args[2:]), call.kwargs


def _slice(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    dim, start, end, step = slice_bounds(call)
    if strategy.inputs[0].is_shard and strategy.inputs[0].dim == dim:
        start, end = start // call.size, end // call.size
    return call.target, (call.args[0], dim, start, end, step), {}


def _embedding(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if strategy.output != P or strategy.inputs[0] == P:
        return call.target, call.args, call.kwargs
    padding_idx = call.argument(2, "padding_idx", -1)
    return vocab_embedding, (*call.args[:2], padding_idx, axis), {}


def _cross_entropy(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if not strategy.inputs[0].is_shard or strategy.inputs[0].dim != 1:
        return call.target, call.args, call.kwargs
    _, reduction, ignore_index, smoothing = cross_entropy_arguments(call.node)
    return vocab_cross_entropy, (*call.args[:2], reduction, ignore_index, smoothing, axis), {}


def _dropout(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    layout = Layout.parse(call.args[4]).with_placement(axis, strategy.output)
    return call.target, (*call.args[:4], str(layout)), {}


def _mean(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if not strategy.inputs[0].is_shard or strategy.output != P:
        return call.target, call.args, call.kwargs
    dims = call.named("dim") or list(range(len(call.shapes[0])))
    return partial_mean, (call.args[0], dims, bool(call.named("keepdim")), axis), {}


def _convolution(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    groups = call.named("groups")
    if groups == 1 or strategy.output.dim != 1:
        return call.target, call.args, call.kwargs
    kwargs = {**call.kwargs, "groups": groups // call.size}
    return call.target, call.args[:6], kwargs


_REWRITES: dict[Any, Callable[[Call, Strategy, str], LocalCall]] = {
    aten.reshape.default: _sizes,
    aten.expand.default: _sizes,
    aten.slice.Tensor: _slice,
    aten.embedding.default: _embedding,
    aten.cross_entropy_loss.default: _cross_entropy,
    seeded_dropout: _dropout,
    **dict.fromkeys(MEANS, _mean),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **LOCAL,
    **attention.LOCAL,
}
