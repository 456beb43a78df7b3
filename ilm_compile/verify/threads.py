"""Ranks as threads of one process, for running rank-local graphs without torch.distributed.

Every rank executes the same code as in training, on its own thread; a collective is a meeting of
the threads that exchanges values through shared memory. Sums are taken in rank order on every rank,
so results do not depend on timing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from ilm_compile.program.communicator import communicators
from ilm_compile.program.traffic import Traffic

T = TypeVar("T")
Turn: TypeAlias = "threading.RLock"


class Released(Exception):
    """Who waited for a rank that failed; that rank's exception is the one to report."""


class ThreadGroup:
    """A meeting place of `size` threads; who waits gives up the lock `turn`, which it may hold."""

    def __init__(self, size: int, turn: Turn | None = None) -> None:
        self.size = size
        self._brought: dict[int, Tensor] = {}
        self._values: list[Tensor] = []  # of the last meeting
        self._meetings = 0
        self._is_closed = False
        self._changed = threading.Condition(turn)

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
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
    """`MeasuredCommunicator` of one thread of a `ThreadGroup`; nothing is counted."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.group, self.rank, self.size = group, rank, group.size
        self.stats: dict[str, Traffic] = {}
        self.waits: list[tuple[float, float]] | None = None

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Return the sum or maximum of every rank's `x`."""
        values = torch.stack(self.group.exchange(self.rank, x))
        return values.sum(0) if op == "sum" else values.amax(0)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return every rank's `x`, stacked."""
        return torch.stack(self.group.exchange(self.rank, x))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's ``x[rank]``."""
        return torch.stack([value[self.rank] for value in self.group.exchange(self.rank, x)]).sum(0)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Return every rank's ``x[rank]``, stacked."""
        return torch.stack([value[self.rank] for value in self.group.exchange(self.rank, x)])


def run_ranks(size: int, function: Callable[[int], T], axis: str = "tp") -> list[T]:
    """Return ``function(rank)`` of every rank, each run on a thread that owns mesh axis `axis`.

    The first exception of any rank is raised here; the other ranks are released from their meeting.
    """
    return run_groups(1, size, lambda _, rank: function(rank), axis=axis)[0]


def run_groups(
    num_groups: int,
    size: int,
    function: Callable[[int, int], T],
    *,
    axis: str = "tp",
    groups: Sequence[ThreadGroup] = (),
    turn: AbstractContextManager[object] | None = None,
    on_failure: Callable[[], None] = lambda: None,
) -> list[list[T]]:
    """Return ``function(group, rank)`` of every rank of `num_groups` groups of `size` ranks.

    Only the ranks of one group meet in collectives, in `groups` where they are given. `turn`: what
    a rank holds while it runs, so that many of them do not fight over the interpreter after each
    small op. `on_failure` is called when a rank has failed, to release those who wait for it
    elsewhere.
    """
    groups = groups or [ThreadGroup(size) for _ in range(num_groups)]
    places = [(index, rank) for index in range(num_groups) for rank in range(size)]

    def body(place: tuple[int, int]) -> T:
        index, rank = place
        tp = ThreadCommunicator(groups[index], rank)
        with turn or nullcontext(), communicators(**{axis: tp}):
            return function(index, rank)

    def release() -> None:
        for group in groups:
            group.close()
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
