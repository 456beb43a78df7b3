"""How long a rank computed in a step, the time it waited for other ranks left out.

All ranks of a step end together, however slow one of them is: the others wait for it. So what tells
a slow rank is not its step but its computing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ilm_compile.runtime.parallel import Parallel

Span = tuple[float, float]  # start and end in seconds of time.perf_counter
_COMPUTE = re.compile(r"(\d+)([FB])\d+")


class BusyClock:
    """Measures a step of `parallel` between `start` and `stop`.

    Counted are the forwards and backwards, less the time in collectives of their tp group. With
    data parallelism, the first forward and the last backward of each stage wait for other ranks in
    between; they are left out where the stage has others. What remains unseen are the waits for
    parameters under ``zero=3``, and on CUDA those for tp ranks.
    """

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel

    def start(self) -> None:
        """Record the next step: on CUDA it then waits for each of its actions."""
        self._parallel.executor.record_timeline = True
        for axis in self._parallel.communicators.values():
            axis.waits = []

    def stop(self) -> float:
        """End the recording; returns the seconds of computing since `start`."""
        axes = self._parallel.communicators.values()
        waits = [wait for axis in axes for wait in axis.waits or ()]
        for axis in axes:
            axis.waits = None
        self._parallel.executor.record_timeline = False
        actions = list(compute_actions(self._parallel.executor.timeline))
        if self._parallel.mesh.fsdp.size > 1:
            actions = _between_the_syncs(actions)
        spans = [span for _, _, span in actions]
        return sum(end - start for start, end in spans) - _overlap(waits, spans)


def compute_actions(
    timeline: Sequence[tuple[str, float, float]],
) -> Iterator[tuple[int, str, Span]]:
    """The stage, kind and span of each forward and backward of a recorded step."""
    for text, start, end in timeline:
        if match := _COMPUTE.fullmatch(text):
            yield int(match[1]), match[2], (start, end)


def _between_the_syncs(actions: list[tuple[int, str, Span]]) -> list[tuple[int, str, Span]]:
    """The actions without each stage's first forward and last backward, or all if none are left."""
    first = {stage: span for stage, kind, span in reversed(actions) if kind == "F"}
    last = {stage: span for stage, kind, span in actions if kind == "B"}
    inner = [a for a in actions if a[2] not in (first.get(a[0]), last.get(a[0]))]
    return inner or actions


def _overlap(waits: Sequence[Span], spans: Sequence[Span]) -> float:
    """The seconds of `waits` that lie inside one of `spans`."""
    return sum(
        max(0.0, min(end, wait_end) - max(start, wait_start))
        for wait_start, wait_end in waits
        for start, end in spans
    )
