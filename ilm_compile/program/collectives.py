"""Typed collectives: the one op that moves a value from one placement to another.

Every legal transition is a row of `TRANSITIONS`: what it does forward, and the transpose of that,
which is what it does backward. There is no bare "all_reduce" in the graph, because its backward
depends on whether its result is I or R: torch's own differentiable all_reduce sums gradients again,
which multiplies an already complete gradient by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ilm_compile.errors import PlacementError
from ilm_compile.program.bound import BoundCommunicator, fresh, real
from ilm_compile.program.communicator import Communicator, ShapeCommunicator, communicator
from ilm_compile.program.functions import graph_function
from ilm_compile.program.placement import Placement, S, join_shards, split_shards

Move = Callable[[Tensor, Communicator, Placement, Placement], Tensor]


def _identity(x: Tensor, comm: Communicator, src: Placement, dst: Placement) -> Tensor:
    return x.view_as(x)


def _joined(x: Tensor, comm: Communicator, src: Placement, dst: Placement) -> Tensor:
    return x.flatten(0, 1) if src == S(0) else join_shards(x.unbind(0), src)


def _in_pieces(x: Tensor, comm: Communicator, src: Placement, dst: Placement) -> Tensor:
    if dst == S(0):
        return x.reshape(comm.size, -1, *x.shape[1:])
    return torch.stack(split_shards(x, dst, comm.size))


@dataclass(frozen=True, slots=True)
class Wire:
    """A move that sends: what a method of `Communicator` does between two local steps."""

    kind: str
    pack: Move = _identity
    unpack: Move = _identity

    def __call__(self, x: Tensor, comm: Communicator, src: Placement, dst: Placement) -> Tensor:
        return self.unpack(getattr(comm, self.kind)(self.pack(x, comm, src, dst)), comm, src, dst)

    @property
    def is_unpacked(self) -> bool:
        """Whether there is anything left to do with what has come."""
        return self.unpack is not _identity


_all_reduce = Wire("all_reduce")
_all_gather = Wire("all_gather", unpack=_joined)
_reduce_scatter = Wire("reduce_scatter", pack=_in_pieces)
_exchange = Wire("all_to_all", pack=_in_pieces, unpack=_joined)


def _slice(x: Tensor, comm: Communicator, src: Placement, dst: Placement) -> Tensor:
    return split_shards(x, dst, comm.size)[comm.rank].contiguous()


def _pad(x: Tensor, comm: Communicator, src: Placement, dst: Placement) -> Tensor:
    shards = [torch.zeros_like(x) for _ in range(comm.size)]
    shards[comm.rank] = x
    return join_shards(shards, src)


def _keep_first(x: Tensor, comm: Communicator, src: Placement, dst: Placement) -> Tensor:
    return x.view_as(x) if comm.rank == 0 else torch.zeros_like(x)


def _all_to_all(x: Tensor, comm: Communicator, src: Placement, dst: Placement) -> Tensor:
    if src.dim == dst.dim:  # same dim, other segments: no direct exchange of equal pieces exists
        return _slice(_all_gather(x, comm, src, dst), comm, src, dst)
    return _exchange(x, comm, src, dst)


# (from, to) -> (name, what is done to the value, what is done to the gradient). Backward runs with
# the two placements exchanged, so the same functions serve both ways.
TRANSITIONS: dict[tuple[str, str], tuple[str, Move, Move]] = {
    ("P", "I"): ("all_reduce", _all_reduce, _identity),
    ("P", "R"): ("all_reduce", _all_reduce, _all_reduce),
    ("I", "R"): ("copy", _identity, _all_reduce),
    ("P", "S"): ("reduce_scatter", _reduce_scatter, _all_gather),
    ("S", "R"): ("all_gather", _all_gather, _reduce_scatter),
    ("S", "I"): ("all_gather", _all_gather, _slice),
    ("I", "S"): ("slice", _slice, _all_gather),
    ("R", "S"): ("slice", _slice, _pad),
    ("S", "S"): ("all_to_all", _all_to_all, _all_to_all),
    ("I", "P"): ("keep_first", _keep_first, _identity),
    ("R", "P"): ("keep_first", _keep_first, _keep_first),
    ("R", "I"): ("copy", _identity, _keep_first),
}
# What each move costs on the wire; the others are local.
WIRE: dict[Move, str] = {
    _all_to_all: _exchange.kind,
    **{wire: wire.kind for wire in (_all_reduce, _all_gather, _reduce_scatter)},
}


def move_of(src: Placement, dst: Placement, *, backward: bool) -> Move:
    """What is done for a transition: to the value, or to its gradient."""
    _, ahead, back = TRANSITIONS[src.kind, dst.kind]
    return back if backward else ahead


def wire_of(src: Placement, dst: Placement, *, backward: bool) -> Wire | None:
    """As `move_of`, if that sends and does so once."""
    move = move_of(src, dst, backward=backward)
    if move is _all_to_all:
        return None if src.dim == dst.dim else _exchange
    return move if isinstance(move, Wire) else None


torch.library.define(
    "ilm::redistribute", "(Tensor x, str src, str dst, str axis, bool backward) -> Tensor"
)


def _move(
    x: Tensor, comm: Communicator, src: Placement, dst: Placement, *, backward: bool
) -> Tensor:
    """Move `x` from `src` to `dst`, backward a gradient the other way; of a bound graph as one op.

    Every rank then has the same graph, whatever it does inside with its part.
    """
    move = move_of(src, dst, backward=backward)
    if isinstance(comm, BoundCommunicator) and move is not _identity:
        result: Tensor = torch.ops.ilm.redistribute(x, str(src), str(dst), comm.name, backward)
        return result
    return move(x, comm, dst, src) if backward else move(x, comm, src, dst)


def _run(x: Tensor, src: str, dst: str, axis: str, backward: bool) -> Tensor:
    ends = Placement.parse(src), Placement.parse(dst)
    return fresh(_move(x, real(axis), *ends, backward=backward), x)


def _run_fake(x: Tensor, src: str, dst: str, axis: str, backward: bool) -> Tensor:
    ends = Placement.parse(src), Placement.parse(dst)
    shapes = ShapeCommunicator(real(axis).size)
    return x.new_empty(_move(x, shapes, *ends, backward=backward).shape)


torch.library.impl("ilm::redistribute", ("cpu", "cuda"), _run)
torch.library.register_fake("ilm::redistribute", _run_fake)


class _Redistribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, src: Placement, dst: Placement) -> Tensor:
        ctx.move = comm, src, dst
        return _move(x, comm, src, dst, backward=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _move(grad, *ctx.move, backward=True), None, None, None


@graph_function()
def redistribute(x: Tensor, src: str, dst: str, axis: str) -> Tensor:
    """Return `x`, placed as `src` on mesh axis `axis`, placed as `dst`.

    Shapes are rank-local: S(dim) inputs and outputs hold 1/size of dimension `dim`. Raises
    `PlacementError` for a pair that is no row of `TRANSITIONS`.
    """
    source, target = Placement.parse(src), Placement.parse(dst)
    if (source.kind, target.kind) not in TRANSITIONS:
        raise PlacementError(f"redistribute: no transition from {src} to {dst} on axis {axis!r}")
    result: Tensor = _Redistribute.apply(x, communicator(axis), source, target)  # type: ignore[no-untyped-call]
    return result
