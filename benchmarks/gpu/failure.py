"""How a section ends early: by faults that it found, by its own clock, by the alarm."""

from __future__ import annotations

import time
from typing import Any

from ilm_compile.errors import IlmCompileError

Result = dict[str, Any]  # what a section fills while it works: kept however it ends


class SectionError(IlmCompileError):
    """A section's checks failed."""


class OutOfTime(BaseException):
    """The alarm of a section's budget. No Exception, so that what records those lets it through."""


class Deadline:
    """Seconds from now after which a section starts nothing more, and reports what it has."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds, 0 after the end."""
        return max(self._end - time.perf_counter(), 0.0)

    @property
    def passed(self) -> bool:
        return self.left == 0
