"""Rows in the order of their experts: sorted, moved to the ranks that have the experts, and back.

A mixture of experts sorts the rows of its tokens by the expert that each was routed to, multiplies
each group by its expert's matrix and puts the rows back. Models write the sort with argsort and
indexing; named, it can be placed: see the kinds T, D and E of `ilm_compile.program.placement`.
Dispatch and combine are the all-to-all of GShard (arXiv:2006.16668, section 3.2) with uneven
splits, so that no token is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.errors import PlacementError
from ilm_compile.program.communicator import Communicator, ShapeCommunicator, communicator
from ilm_compile.program.functions import graph_function
from ilm_compile.program.placement import Placement


@graph_function()
def expert_order(experts: Tensor) -> Tensor:
    """Return the order (n,) in which rows lie when sorted by `experts` (n,); equal ones stay."""
    return experts.argsort(stable=True)


class _SortRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, repeats: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.repeats = repeats
        return x[order // repeats] if repeats > 1 else x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        back = _placed_back(grad, order)
        if ctx.repeats > 1:
            back = back.view(-1, ctx.repeats, *back.shape[1:]).sum(1)
        return back, None, None


class _UnsortRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return _placed_back(rows, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.saved_tensors[0]], None


@graph_function()
def sort_rows(x: Tensor, order: Tensor, repeats: int) -> Tensor:
    """Return the rows of `x`, each `repeats` times, in `order`.

    x: (n / repeats, ...); order: (n,), of `expert_order`; the result: (n, ...).
    """
    if not x.is_floating_point():
        return x[order // repeats]
    result: Tensor = _SortRows.apply(x, order, repeats)  # type: ignore[no-untyped-call]
    return result


@graph_function()
def unsort_rows(rows: Tensor, order: Tensor) -> Tensor:
    """Return sorted `rows` (n, ...) where they were before: the inverse of `sort_rows`."""
    if not rows.is_floating_point():
        return _placed_back(rows, order)
    result: Tensor = _UnsortRows.apply(rows, order)  # type: ignore[no-untyped-call]
    return result


def _placed_back(rows: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(rows).index_copy(0, order, rows)


class _Groups:
    """Which rows go where: `offsets` (experts,) end each expert's rows here.

    sent, received: numbers of rows by rank. offsets: the ends of the rows of this rank's experts,
    once `order` has sorted what arrives.
    """

    def __init__(self, offsets: Tensor, comm: Communicator) -> None:
        counts = offsets.diff(prepend=offsets.new_zeros(1)).view(comm.size, -1)
        arrived = comm.all_to_all(counts.contiguous())  # (ranks, experts of this rank)
        self.sent, self.received = counts.sum(1).tolist(), arrived.sum(1).tolist()
        self.offsets = arrived.sum(0).cumsum(0).to(offsets.dtype)
        experts = torch.arange(arrived.shape[1], device=offsets.device).repeat(comm.size)
        self.order = expert_order(experts.repeat_interleave(arrived.flatten()))


def _groups(offsets: Tensor, comm: Communicator) -> _Groups:
    """Return the groups of `offsets`; they are exchanged once, for all that is moved by them."""
    found: _Groups | None = getattr(offsets, "_expert_groups", None)
    if found is None:
        found = _Groups(offsets, comm)
        offsets._expert_groups = found  # type: ignore[attr-defined]
    return found


def _dispatch(x: Tensor, offsets: Tensor, comm: Communicator) -> Tensor:
    groups = _groups(offsets, comm)
    return comm.exchange(x, groups.sent, groups.received)[groups.order]


def _combine(x: Tensor, offsets: Tensor, comm: Communicator) -> Tensor:
    groups = _groups(offsets, comm)
    return comm.exchange(_placed_back(x, groups.order), groups.received, groups.sent)


def _kept(offsets: Tensor, comm: Communicator) -> tuple[int, int, int]:
    """Return start, end and number of rows: of this rank's experts, and of all."""
    here = offsets.shape[0] // comm.size
    ends: list[int] = [0, *offsets.tolist()]
    return ends[comm.rank * here], ends[(comm.rank + 1) * here], ends[-1]


def _take(x: Tensor, offsets: Tensor, comm: Communicator) -> Tensor:
    start, end, _ = _kept(offsets, comm)
    return x[start:end].clone()


def _put(x: Tensor, offsets: Tensor, comm: Communicator) -> Tensor:
    start, end, rows = _kept(offsets, comm)
    whole = x.new_zeros((rows, *x.shape[1:]))
    whole[start:end] = x
    return whole


def _exchanged_offsets(x: Tensor, offsets: Tensor, comm: Communicator) -> Tensor:
    return _groups(offsets, comm).offsets


def _taken_offsets(x: Tensor, offsets: Tensor, comm: Communicator) -> Tensor:
    start, _, _ = _kept(offsets, comm)
    return x.chunk(comm.size)[comm.rank] - start


Route = Callable[[Tensor, Tensor, Communicator], Tensor]
# As `TRANSITIONS`: name, what is done to the value, what to its gradient; counts have none.
ROUTES: dict[tuple[str, str], tuple[str, Route, Route]] = {
    ("T", "D"): ("dispatch", _dispatch, _combine),
    ("D", "T"): ("combine", _combine, _dispatch),
    ("R", "E"): ("take", _take, _put),
    ("E", "P"): ("put", _put, _take),
    ("C", "D"): ("exchange_counts", _exchanged_offsets, _exchanged_offsets),
}
OPERAND = {  # how the offsets lie by which a value is moved
    **dict.fromkeys([("T", "D"), ("D", "T"), ("C", "D")], "C"),
    **dict.fromkeys([("R", "E"), ("E", "P")], "R"),
}
SENT = {pair for pair, kind in OPERAND.items() if kind == "C"}  # what is more than a local move


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offsets: Tensor, comm: Communicator, forward: Route, backward: Route
    ) -> Tensor:
        ctx.back = offsets, comm, backward
        return forward(x, offsets, comm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        offsets, comm, backward = ctx.back
        return backward(grad.contiguous(), offsets, comm), None, None, None, None


@graph_function()
def route(x: Tensor, offsets: Tensor, src: str, dst: str, axis: str) -> Tensor:
    """Return the rows `x`, placed as `src` on mesh axis `axis`, placed as `dst`.

    x: (rows, ...) in the order of experts, or `offsets` itself: (experts,), the end of the rows of
    each expert, of this rank's rows for T and D, of all rows for E. How many rows there are in the
    placements D and E depends on the batch. Raises `PlacementError` for a pair that is no row of
    `ROUTES`.
    """
    source, target = Placement.parse(src), Placement.parse(dst)
    pair = source.kind, target.kind
    if pair not in ROUTES:
        raise PlacementError(f"route: no transition from {src} to {dst} on axis {axis!r}")
    comm = communicator(axis)
    if isinstance(comm, ShapeCommunicator):
        whole = source.global_shape(x.shape, comm.size)
        return x.new_empty(target.local_shape(whole, comm.size))
    _, forward, backward = ROUTES[pair]
    if x is offsets:
        return (_taken_offsets if pair[1] == "E" else forward)(x, offsets, comm)
    if not x.is_floating_point():
        return forward(x, offsets, comm)
    result: Tensor = _Routed.apply(x, offsets, comm, forward, backward)  # type: ignore[no-untyped-call]
    return result


def route_of(node: fx.Node) -> tuple[str, str]:
    """Return the kinds of placement between which a `route` of the graph moves."""
    src, dst = (Placement.parse(str(node.kwargs[key])).kind for key in ("src", "dst"))
    return src, dst


@graph_function()
def grouped_product(rows: Tensor, weights: Tensor, offs: Tensor, **options: Any) -> Tensor:
    """Return what torch's grouped product gives, in any dtype: it refuses float64.

    rows: (n, k), of which expert e's end before `offs` (experts,)[e]; weights: (experts, k, m); the
    result: (n, m).
    """
    bounds = [0, *offs.tolist()]
    groups = zip(bounds, bounds[1:], weights, strict=False)
    return torch.cat([rows[start:end] @ weight for start, end, weight in groups])
