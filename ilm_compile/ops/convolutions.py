"""Rules of convolutions, which mix neighbouring tokens, and channels within a group.

Values are (batch, channels, tokens...), weights (channels, channels per group, window...). A
depthwise convolution, as state-space models have it, is sharded by channels; the call's `groups`
is then this rank's share of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from ilm_compile.ops.strategy import (
    GLOBAL_ARGUMENTS,
    Call,
    Strategy,
    aten,
    rule,
)
from ilm_compile.program.layout import MeshAxis, layout_of
from ilm_compile.program.placement import P, Placement, R, S

CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
)


@rule(*CONVOLUTIONS)
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


def _global_groups(
    node: fx.Node, inputs: tuple[fx.Node, ...], axis: MeshAxis
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs: dict[str, Any] = dict(node.kwargs)
    for name, placement in layout_of(node).shards(axis.sizes) if "groups" in kwargs else ():
        if layout_of(inputs[0]).on(name).dim == placement.dim == 1:
            kwargs["groups"] *= axis.sizes[name]
    return node.args, kwargs


GLOBAL_ARGUMENTS.update(dict.fromkeys(CONVOLUTIONS, _global_groups))
