"""Convolutions, which mix neighbouring tokens, and channels within a group.

Values are (batch, channels, tokens...), weights (channels, channels per group, window...). A
depthwise convolution, as state-space models have it, is sharded by channels; the call's `groups`
is then this rank's share of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from torch import fx

from ilm_compile.ops.call import Arguments, Call, LocalCall, Strategy, aten, unchanged
from ilm_compile.ops.nodes import shape_of
from ilm_compile.ops.spec import Flops, rule
from ilm_compile.program.layout import MeshAxis, layout_of
from ilm_compile.program.placement import P, Placement, R, S


def _local(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    groups = call.named("groups")
    if groups == 1 or strategy.output.dim != 1:
        return unchanged(call)
    return call.target, call.args[:6], {**call.kwargs, "groups": groups // call.size}


def _global_groups(node: fx.Node, inputs: tuple[fx.Node, ...], axis: MeshAxis) -> Arguments:
    kwargs = dict(node.kwargs)
    for name, placement in layout_of(node).shards(axis.sizes) if "groups" in kwargs else ():
        if layout_of(inputs[0]).on(name).dim == placement.dim == 1:
            kwargs["groups"] *= axis.sizes[name]  # type: ignore[operator]
    return node.args, kwargs


def _flops(node: fx.Node) -> int:
    return 2 * int(node.meta["val"].numel()) * prod(shape_of(node.args[1])[1:])


@rule(
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
    local=_local,
    global_arguments=_global_groups,
    flops=Flops(_flops, lambda node: node.args[:2]),
)
def convolution(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """By channels: groups whole on a rank, or column-wise and row-wise; or by batch."""
    groups = call.named("groups")
    depthwise = groups == call.shapes[0][1] == call.shape[1]
    bias = call.shapes[2:]
    for out in wanted:
        if out.dim == 0:
            yield Strategy((out, R, *(R for _ in bias)), out)
        channels = out.along(0)
        if out.dim == 1 and groups == 1:
            yield Strategy((R, channels, *(channels for _ in bias)), out)
        elif out.dim == 1 and (depthwise or (groups % call.size == 0 and out == S(1))):
            yield Strategy((out, channels, *(channels for _ in bias)), out)
    if groups == 1:
        yield Strategy((S(1), S(1), *(P for _ in bias)), P)
    yield Strategy((P, R, *(P for _ in bias)), P)
    yield Strategy((R, P, *(P for _ in bias)), P)
