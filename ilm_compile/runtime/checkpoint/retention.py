"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ilm_compile.runtime.checkpoint.storage import STEP


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder, None for any other name."""
    match = STEP.fullmatch(name)
    return int(match[1]) if match else None


def superseded(
    steps: Iterable[int],
    *,
    keep_last: int,
    keep_every: int,
    is_sound: Callable[[int], bool] = lambda step: True,
) -> list[int]:
    """Those of `steps` to delete: older than the last `keep_last` sound ones.

    Multiples of `keep_every` stay for good; 0: none. is_sound is asked of the newest, one after the
    other, until enough are.
    """
    newest_first = sorted(steps, reverse=True)
    num_kept = 0
    while newest_first and num_kept < keep_last:
        num_kept += is_sound(newest_first.pop(0))
    return [step for step in reversed(newest_first) if not keep_every or step % keep_every]
