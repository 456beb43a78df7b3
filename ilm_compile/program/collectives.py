"""Typed collectives: the one op that moves a value from one placement to another.

Every legal transition is a row of `TRANSITIONS`: what it does forward, and the transpose of that,
which is what it does backward. There is no bare "all_reduce" in the graph, because its backward
depends on whether its result is I or R: torch's own differentiable all_reduce sums gradients again,
which multiplies an already complete gradient by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
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


def _all_reduce(x: Tensor, comm: Communicator, src: Placement, dst: Placement) -> Tensor:
    return comm.all_reduce(x)


def _all_gather(x: Tensor, comm: Communicator, src: Placement, dst: Placement) -> Tensor:
    stacked = comm.all_gather(x.contiguous())
    if src == S(0):
        return stacked.flatten(0, 1)
    return join_shards(stacked.unbind(0), src)


def _reduce_scatter(x: Tensor, comm: Communicator, src: Placement, dst: Placement) -> Tensor:
    if dst == S(0):
        return comm.reduce_scatter(x.reshape(comm.size, -1, *x.shape[1:]))
    return comm.reduce_scatter(torch.stack(split_shards(x, dst, comm.size)))


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
    pieces = torch.stack(split_shards(x, dst, comm.size))
    return join_shards(comm.all_to_all(pieces).unbind(0), src)


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
    _all_reduce: "all_reduce",
    _all_gather: "all_gather",
    _reduce_scatter: "reduce_scatter",
    _all_to_all: "all_to_all",
}


torch.library.define(
    "ilm::redistribute", "(Tensor x, str src, str dst, str axis, bool backward) -> Tensor"
)


def _move(
    x: Tensor, comm: Communicator, src: Placement, dst: Placement, *, backward: bool
) -> Tensor:
    """Move `x` from `src` to `dst`, backward a gradient the other way; of a bound graph as one op.

    Every rank then has the same graph, whatever it does inside with its part.
    """
    _, ahead, back = TRANSITIONS[src.kind, dst.kind]
    move = back if backward else ahead
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
