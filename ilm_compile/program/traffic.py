"""What the collectives of a program put on the wire: bytes each rank sends, by the ring algorithms.

Bytes are counted as NVIDIA/nccl-tests does (doc/PERFORMANCE.md) and as the runtime's communicators
count them, so that what `explain` predicts can be compared with a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, fx

from ilm_compile.program.collectives import TRANSITIONS, WIRE, Move, redistribute
from ilm_compile.program.placement import Placement
from ilm_compile.program.vocab import vocab_cross_entropy

# What each of n ranks sends, as a share of the full tensor.
SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n**2,
    "broadcast": lambda n: 1.0,
    "p2p": lambda n: 1.0,
}


class Message(NamedTuple):
    """One collective: its kind, the bytes each rank sends, and the direction it runs in."""

    kind: str
    num_bytes: float
    backward: bool


def traffic(node: fx.Node, size: int, *, has_gradient: bool = True) -> list[Message]:
    """Return the collectives that `node` runs per micro-batch over `size` ranks.

    `has_gradient`: whether a gradient flows back through the node.
    """
    if node.target is redistribute:
        source, target = (Placement.parse(str(node.kwargs[key])) for key in ("src", "dst"))
        full = _bytes(node.meta["val"]) * (size if target.is_shard else 1)
        _, forward, backward = TRANSITIONS[source.kind, target.kind]
        moves = [(forward, False), (backward, True)][: 1 + has_gradient]
        shards = sorted({source, target}, key=str)
        return [m for move, back in moves for m in _messages(move, full, size, back, shards)]
    if node.target is vocab_cross_entropy:
        logits = node.args[0].meta["val"]  # type: ignore[union-attr]
        row = _bytes(logits) // logits.shape[-1]
        stacked = 3 if node.args[4] else 2  # label smoothing reduces a third number per token
        sent = SENT["all_reduce"](size)
        return [Message("all_reduce", n * row * sent, False) for n in (1, stacked)]
    return []


def _messages(
    move: Move, full: float, size: int, backward: bool, placements: list[Placement]
) -> list[Message]:
    if move not in WIRE:
        return []
    kind = WIRE[move]
    if kind == "all_to_all" and len({p.dim for p in placements}) == 1:
        kind = "all_gather"  # other segments of one dim: gathered and cut again
    return [Message(kind, full * SENT[kind](size), backward)]


def _bytes(val: Tensor) -> int:
    return val.numel() * val.element_size()
