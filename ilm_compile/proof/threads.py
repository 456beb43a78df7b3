"""Ranks as threads of one process, for running rank-local graphs without torch.distributed.

Every rank executes the same code as in training, on its own thread; a collective is a meeting of
the threads that exchanges values through shared memory. Sums are taken in rank order on every rank,
so results do not depend on timing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ilm_compile.program.communicator import communicators
from ilm_compile.program.layout import Place, Sizes
from ilm_compile.program.traffic import Traffic

T = TypeVar("T")
Turn: TypeAlias = "threading.RLock"


class Released(Exception):
    """Who waited for a rank that failed; that rank's exception is the one to report."""


class ThreadGroup:
    """A meeting place of `size` threads; who waits gives up the lock `turn`, which it may hold."""

    def __init__(self, size: int, turn: Turn | None = None) -> None:
        self.size = size
        self._brought: dict[int, Any] = {}
        self._values: list[Any] = []  # of the last meeting
        self._meetings = 0
        self._is_closed = False
        self._changed = threading.Condition(turn)

    def exchange(self, rank: int, x: T) -> list[T]:
        """Return every rank's `x`, in rank order. Raises `Released` if the group was closed."""
        with self._changed:
            self._brought[rank] = x
            meeting = self._meetings
            if len(self._brought) == self.size:
                self._values = [self._brought[each] for each in range(self.size)]
                self._brought.clear()
                self._meetings += 1
                self._changed.notify_all()
            while self._meetings == meeting:  # the next one cannot end before all have left this
                if self._is_closed:
                    raise Released
                self._changed.wait()
            return self._values

    def close(self) -> None:
        """Release everyone who waits here, for good."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class ThreadCommunicator:
    """`MeasuredCommunicator` of one thread of a `ThreadGroup`; nothing is counted.

    What it brings is copied: the others may read it when compiled code of this thread, which takes
    the call for done, already writes there again.
    """

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.group, self.rank, self.size = group, rank, group.size
        self.stats: dict[str, Traffic] = {}
        self.waits: list[tuple[float, float]] | None = None

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Return the sum or maximum of every rank's `x`."""
        values = torch.stack(self._everyones(x))
        return values.sum(0) if op == "sum" else values.amax(0)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return every rank's `x`, stacked."""
        return torch.stack(self._everyones(x))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's ``x[rank]``."""
        return torch.stack([value[self.rank] for value in self._everyones(x)]).sum(0)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Return every rank's ``x[rank]``, stacked."""
        return torch.stack([value[self.rank] for value in self._everyones(x)])

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Return the rows that every rank has for this one, in rank order."""
        everyones = self.group.exchange(self.rank, torch.split(x.clone(), sent))
        mine = [pieces[self.rank] for pieces in everyones]
        came = [len(piece) for piece in mine]
        assert came == received, f"rank {self.rank} expected {received} rows, {came} came"
        return torch.cat(mine)

    def shift(self, xs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Return what returns the `xs` of the rank before."""
        came = self.group.exchange(self.rank, [x.clone() for x in xs])[self.rank - 1]
        return lambda: came

    def start(self, kind: str, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Return what is there at once, and nothing to wait for."""
        return getattr(self, kind)(x), lambda: None

    def _everyones(self, x: Tensor) -> list[Tensor]:
        return self.group.exchange(self.rank, x.clone())


class AxisGroups:
    """Where the threads of one mesh meet: a group for the ranks that differ on given axes alone.

    Ranks are numbered with the last axis fastest, so that a value cut axis after axis is the list
    of its parts.
    """

    def __init__(self, sizes: Sizes, turn: Turn | None = None) -> None:
        self.sizes = dict(sizes)
        self.size = prod(self.sizes.values())
        self._turn = turn
        self._is_closed = False
        self._groups: dict[tuple[int, ...], ThreadGroup] = {}

    def place(self, rank: int) -> Place:
        """The coordinates of rank number `rank`."""
        ranks = {}
        for axis, size in reversed(self.sizes.items()):
            rank, ranks[axis] = divmod(rank, size)
        return Place(self.sizes, {axis: ranks[axis] for axis in self.sizes})

    def communicators(self, rank: int) -> dict[str, ThreadCommunicator]:
        """What rank number `rank` reaches the others by, on each axis."""
        return {axis: self.communicator(rank, [axis]) for axis in self.sizes}

    def communicator(self, rank: int, axes: Iterable[str]) -> ThreadCommunicator:
        """What rank number `rank` reaches those by that are elsewhere on `axes` alone."""
        shared = {axis: n for axis, n in self.place(rank).ranks.items() if axis not in axes}
        members = [
            other for other in range(self.size) if shared.items() <= self.place(other).ranks.items()
        ]
        new = ThreadGroup(len(members), self._turn)
        group = self._groups.setdefault(tuple(members), new)
        if self._is_closed:
            group.close()
        return ThreadCommunicator(group, members.index(rank))

    def close(self) -> None:
        """Release everyone who waits, and who would."""
        self._is_closed = True
        for group in [*self._groups.values()]:
            group.close()


def run_ranks(size: int | Sizes, function: Callable[[int], T], axis: str = "tp") -> list[T]:
    """Return ``function(rank)`` of every rank, each run on a thread of its own.

    size: of mesh axis `axis`, or of several axes by name. The first exception of any rank is raised
    here; the other ranks are released from their meeting.
    """
    sizes = {axis: size} if isinstance(size, int) else size
    return run_groups(1, sizes, lambda _, rank: function(rank))[0]


def run_groups(
    num_groups: int,
    sizes: Sizes,
    function: Callable[[int, int], T],
    *,
    meshes: Sequence[AxisGroups] = (),
    turn: AbstractContextManager[object] | None = None,
    on_failure: Callable[[], None] = lambda: None,
) -> list[list[T]]:
    """Return ``function(group, rank)`` of every rank of `num_groups` meshes of these `sizes`.

    Only the ranks of one mesh meet in collectives, in `meshes` where they are given. `turn`: what
    a rank holds while it runs, so that many of them do not fight over the interpreter after each
    small op. `on_failure` is called when a rank has failed, to release those who wait for it
    elsewhere.
    """
    meshes = meshes or [AxisGroups(sizes) for _ in range(num_groups)]
    size = meshes[0].size
    places = [(index, rank) for index in range(num_groups) for rank in range(size)]

    def body(place: tuple[int, int]) -> T:
        index, rank = place
        axes = meshes[index].communicators(rank)
        with turn or nullcontext(), communicators(**axes):
            return function(index, rank)

    def release() -> None:
        for mesh in meshes:
            mesh.close()
        on_failure()

    results = _run_all(places, body, release)
    return [results[start : start + size] for start in range(0, len(places), size)]


def _run_all(
    places: Sequence[tuple[int, int]],
    function: Callable[[tuple[int, int]], T],
    release: Callable[[], None],
) -> list[T]:
    """Return ``function(place)`` of every place, each on a thread of its own."""
    results: dict[tuple[int, int], T] = {}
    failures: list[BaseException] = []

    def body(place: tuple[int, int]) -> None:
        try:
            results[place] = function(place)
        except Released:
            pass
        except BaseException as error:
            failures.append(error)
            release()

    threads = [threading.Thread(target=body, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[place] for place in places]
