"""Notices a rank that computes longer than others do for the same work."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from ilm_compile.runtime.mesh import Mesh

_HISTORY = 10
_MIN_HISTORY = 3


class SlowRankWatch:
    """Compares each rank with the median of the others of its pipeline stage, which do as much.

    A stage of one rank has no others; it is compared with the median of its own last times. Stages
    are not compared with one another: they may have been given unequal work.
    """

    def __init__(self, ratio: float, mesh: Mesh) -> None:
        self._ratio = ratio
        per_stage = mesh.fsdp.size * mesh.tp.size
        self._peers = [
            [p for p in range(mesh.world_size) if p != rank and p // per_stage == rank // per_stage]
            for rank in range(mesh.world_size)
        ]
        self._history: list[deque[float]] = [deque(maxlen=_HISTORY) for _ in range(mesh.world_size)]

    def update(self, times: Sequence[float]) -> list[tuple[int, float]]:
        """Take note of the ranks' times in seconds; returns the slow ones and by what factor."""
        slow = []
        for rank, (time, peers) in enumerate(zip(times, self._peers, strict=True)):
            past = self._history[rank]
            usual = 0.0
            if peers:
                usual = median(times[peer] for peer in peers)
            elif len(past) >= _MIN_HISTORY:
                usual = median(past)
            past.append(time)
            if usual > 0 and time > self._ratio * usual:
                slow.append((rank, time / usual))
        return slow
