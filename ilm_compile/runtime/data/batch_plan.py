"""How many rows each batch has, and which batches are left out: InternLM's two strings.

``rampup_batch_size`` "start increment every" and ``skip_batches`` "2-5,10" mean what they mean to
InternEvo's internlm/data/tokenized/batch_sampler.py and internlm/utils/common.py (BatchSkipper):
batches are counted from 0, and a skipped one is drawn but not trained on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from ilm_compile.errors import IlmCompileError


@dataclass(frozen=True, slots=True)
class BatchRamp:
    """Batch b has min(full, start + increment * (b // every)) rows."""

    start: int
    increment: int
    every: int

    def __post_init__(self) -> None:
        if min(self.start, self.increment, self.every) < 1:
            raise IlmCompileError(
                "rampup_batch_size: expected three numbers of at least 1 (start, increment, number "
                f"of batches between increments), got {self.start} {self.increment} {self.every}"
            )

    @classmethod
    def parse(cls, text: str, *, unit: int = 1) -> Self | None:
        """Read "start increment every"; None for an empty text.

        unit: rows that one unit of start and increment stands for. InternLM counts micro-batches
        of one data-parallel rank, so its unit is ``micro_bsz * dp``.
        """
        words = text.split()
        if not words:
            return None
        if len(words) != 3 or not all(re.fullmatch(r"\d{1,15}", word) for word in words):
            raise IlmCompileError(
                f'rampup_batch_size: expected "start increment every", such as "4 2 100", got '
                f"{text!r}"
            )
        start, increment, every = map(int, words)
        return cls(start * unit, increment * unit, every)

    def rows(self, batch: int, full: int) -> int:
        """The rows of batch number `batch` if a full batch has `full`."""
        return min(full, self.start + self.increment * (batch // self.every))


@dataclass(frozen=True, slots=True)
class BatchNumbers:
    """A set of batch numbers, as ranges that include both ends."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "2-5,10"; an empty text holds no number."""
        return cls(tuple(_range(part.strip(), text) for part in text.split(",") if text.strip()))

    def __contains__(self, batch: int) -> bool:
        return any(first <= batch <= last for first, last in self.ranges)


def _range(part: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,15})(?:\s*-\s*(\d{1,15}))?", part)
    if match is not None:
        first, last = int(match[1]), int(match[2] or match[1])
        if first <= last:
            return first, last
    raise IlmCompileError(
        f'skip_batches: expected numbers and ranges such as "2-5,10", got {part!r} in {text!r}'
    )
