"""What this process does at the moment, in words: written by its main thread, read by the watchdog.

The executor tells every action, the trainer every part of a step, the checkpoints every save and
load. Telling costs two attribute writes, so it is always on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Activity:
    """phase: a part of the job, such as "step 5: forward and backward". action: what is done of it,
    such as "wait 1F0", empty where the phase says it all. changes: grows with everything told, so
    that one who looks twice knows whether anything moved. patient: the phase may well take long, as
    reading a checkpoint does. steps_done: of the training. stopping: why it ends before its last
    step, "" if it does not. watcher: called with each action as it begins, and with "" for a phase.
    """

    __slots__ = ("action", "changes", "patient", "phase", "steps_done", "stopping", "watcher")

    def __init__(self) -> None:
        self.phase = "start"
        self.action = ""
        self.patient = True
        self.changes = 0
        self.steps_done = 0
        self.stopping = ""
        self.watcher: Callable[[str], None] | None = None

    def enter(self, phase: str, *, patient: bool = False) -> None:
        """The next phase begins."""
        self.phase, self.action, self.patient = phase, "", patient
        self.changes += 1
        if self.watcher is not None:
            self.watcher("")

    def do(self, action: str) -> None:
        """The next action of the phase begins."""
        self.action = action
        self.changes += 1
        if self.watcher is not None:
            self.watcher(action)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase within another, which goes on after it; an error leaves it as it is."""
        before = self.phase, self.patient
        self.enter(f"{self.phase}: {phase}", patient=True)
        yield
        self.enter(before[0], patient=before[1])

    def text(self) -> str:
        """Both in one line."""
        return f"{self.phase}, {self.action}" if self.action else self.phase


ACTIVITY = Activity()  # of this process
