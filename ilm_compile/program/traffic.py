"""What the collectives of a program put on the wire: bytes each rank sends, by the ring algorithms.

Bytes are counted as NVIDIA/nccl-tests does (doc/PERFORMANCE.md) and as the runtime's communicators
count them, so that what `explain` predicts can be compared with a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx

from ilm_compile.program.collectives import TRANSITIONS, WIRE, Move, redistribute
from ilm_compile.program.expert_rows import SENT as SENT_ROUTES
from ilm_compile.program.expert_rows import route, route_of
from ilm_compile.program.functions import FUNCTIONS
from ilm_compile.program.layout import Sizes
from ilm_compile.program.placement import Placement
from ilm_compile.program.query_attention import parts_of
from ilm_compile.program.ring_products import gather_products, product_scatter

# What each of n ranks sends, as a share of the full tensor.
SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n**2,
    "broadcast": lambda n: 1.0,
    "p2p": lambda n: 1.0,
}

# Of a product beside a collective, what has the size of a piece that travels.
PIECES: dict[Any, Callable[[fx.Node], fx.Node]] = {
    gather_products: lambda node: node.all_input_nodes[0],
    product_scatter: lambda node: node,
}


def sent_bytes(kind: str, num_bytes: int, size: int) -> int:
    """Return the bytes each of `size` ranks sends, rounded, for a full tensor of `num_bytes`.

    The full tensor is what an all-gather returns, what a reduce-scatter and an all-reduce take on
    each rank, and for an all-to-all the tensor that the ranks hold together.
    """
    return round(num_bytes * SENT[kind](size))


@dataclass(slots=True)
class Traffic:
    """A number of collectives, and the bytes that a rank sent in them."""

    calls: int = 0
    num_bytes: int = 0

    def add(self, num_bytes: int, calls: int = 1) -> None:
        """Count further calls, in which `num_bytes` were sent together."""
        self.calls += calls
        self.num_bytes += num_bytes


class Message(NamedTuple):
    """One collective: its kind, the bytes each rank sends, and the direction it runs in."""

    kind: str
    num_bytes: int
    backward: bool


def traffic(node: fx.Node, sizes: Sizes, *, has_gradient: bool = True) -> list[Message]:
    """Return the collectives that `node` runs per micro-batch on a mesh of these sizes.

    `has_gradient`: whether a gradient flows back through the node.
    """
    if node.target is redistribute:
        size = sizes[str(node.kwargs["axis"])]
        source, target = (Placement.parse(str(node.kwargs[key])) for key in ("src", "dst"))
        full = _bytes(node.meta["val"]) * (size if target.is_shard else 1)
        _, forward, backward = TRANSITIONS[source.kind, target.kind]
        moves = [(forward, False), (backward, True)][: 1 + has_gradient]
        shards = sorted({source, target}, key=str)
        return [m for move, back in moves for m in _messages(move, full, size, back, shards)]
    if node.target is route:
        return _routed(node, sizes[str(node.kwargs["axis"])], has_gradient)
    if node.target in PIECES:
        return _pieces(node, sizes[str(node.args[-1])], has_gradient)
    if parts_of(node) > 1:
        return _shifted(node, parts_of(node), has_gradient)
    inside = FUNCTIONS.get(node.target)
    if inside is None or not node.args[-1]:  # over no axis
        return []
    size = sizes[str(node.args[-1])]
    reduced = inside(node)[: 1 + has_gradient]
    return [
        Message("all_reduce", sent_bytes("all_reduce", num_bytes, size), bool(backward))
        for backward, sizes in enumerate(reduced)
        for num_bytes in sizes
    ]


def _routed(node: fx.Node, size: int, has_gradient: bool) -> list[Message]:
    """Rows of experts, as many for each rank: how many they are depends on the batch."""
    if route_of(node) not in SENT_ROUTES:
        return []
    sent = sent_bytes("all_to_all", _bytes(node.meta["val"]) * size, size)
    is_real = has_gradient and node.meta["val"].is_floating_point()
    return [Message("all_to_all", sent, back) for back in (False, True)[: 1 + is_real]]


def _shifted(node: fx.Node, size: int, has_gradient: bool) -> list[Message]:
    """Keys and values go to all other ranks; in backward again, and their gradients home too."""
    held = sum(_bytes(value.meta["val"]) for value in node.args[1:3])  # type: ignore[union-attr, misc]
    hops = [Message("shift", held, False)] * (size - 1)
    return hops + [Message("shift", held, True)] * (2 * size - 1) * has_gradient


def _pieces(node: fx.Node, size: int, has_gradient: bool) -> list[Message]:
    """The tokens of all other ranks pass each rank on their way; so do their gradients."""
    piece = _bytes(PIECES[node.target](node).meta["val"])
    ways = (False, True)[: 1 + has_gradient]
    return [Message("shift", piece, backward) for backward in ways for _ in range(size - 1)]


def _messages(
    move: Move, full: int, size: int, backward: bool, placements: list[Placement]
) -> list[Message]:
    if move not in WIRE:
        return []
    kind = WIRE[move]
    if kind == "all_to_all" and len({p.dim for p in placements}) == 1:
        kind = "all_gather"  # other segments of one dim: gathered and cut again
    return [Message(kind, sent_bytes(kind, full, size), backward)]


def _bytes(val: Tensor) -> int:
    return val.numel() * val.element_size()
