"""How graph code reaches the other ranks of a mesh axis.

While a program is compiled, a collective in its graph names its axis only ("tp"), and whoever runs
the graph decides in its own thread what `Communicator` stands behind the name: shapes alone, or
threads. A stage that is materialised is bound to its communicators, each by a name of its own:
`ilm_compile.program.bound`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ilm_compile.errors import ProgramError


class Communicator(Protocol):
    """The ranks of one mesh axis. No method changes its argument."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Return the sum (or ``"max"``) of every rank's `x`, of the same shape."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return every rank's `x` stacked: (size, *x.shape)."""
        ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return this rank's entry of the sum of every rank's `x`: (size, *shape) -> shape."""
        ...

    def all_to_all(self, x: Tensor) -> Tensor:
        """Return entry `rank` of every rank's `x`, stacked: (size, *shape) -> (size, *shape)."""
        ...

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Return the rows that every rank has for this one, in rank order.

        sent: how many rows of `x`, in order, go to each rank. received: how many come from each;
        the ranks have told each other before.
        """
        ...

    def shift(self, xs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Start to send `xs` to the next rank, the last one's to the first.

        Returns what waits for, and returns, those of the rank before, of the same shapes.
        """
        ...

    def start(self, kind: str, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Start the collective with this name, all but `exchange` and `shift`.

        Returns its result, which may be read when what comes with it has waited.
        """
        ...


class ShapeCommunicator:
    """Stands for `size` ranks of which none exists: results have the right shape and no values."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        return torch.empty_like(x)

    def all_gather(self, x: Tensor) -> Tensor:
        return x.new_empty((self.size, *x.shape))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[1:])

    def all_to_all(self, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return torch.empty_like(x)  # counts have no values here either: as many rows as were sent

    def shift(self, xs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [torch.empty_like(x) for x in xs]

    def start(self, kind: str, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        return getattr(self, kind)(x), lambda: None


# By a name that is no axis: see `ilm_compile.program.bound`.
named: WeakValueDictionary[str, Communicator] = WeakValueDictionary()
_thread = threading.local()


def shape_communicators(sizes: Mapping[str, int]) -> AbstractContextManager[None]:
    """Within it, graph code runs for its shapes alone on a mesh of these sizes."""
    return communicators(**{axis: ShapeCommunicator(size) for axis, size in sizes.items()})


@contextmanager
def communicators(**axes: Communicator) -> Iterator[None]:
    """Use `axes` in this thread until the block ends, for graphs that are bound to none."""
    previous = getattr(_thread, "axes", None)
    _thread.axes = axes
    try:
        yield
    finally:
        _thread.axes = previous


def communicator(axis: str) -> Communicator:
    """Return what stands behind `axis`: a name that a graph was bound to, or an axis, here."""
    if (found := named.get(axis)) is not None:
        return found
    axes: Mapping[str, Communicator] = getattr(_thread, "axes", None) or {}
    try:
        return axes[axis]
    except KeyError:
        raise ProgramError(
            f"collective: mesh axis {axis!r} has no communicator in this thread, known are "
            f"{sorted(axes)}; run the program through parallelize() or inside communicators(...)"
        ) from None
