"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Iterable

from ilm_compile.runtime.checkpoint.storage import STEP


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder, None for any other name."""
    match = STEP.fullmatch(name)
    return int(match[1]) if match else None


def superseded(steps: Iterable[int], *, keep_last: int, keep_every: int) -> list[int]:
    """Those of `steps` to delete: neither of the last `keep_last` nor multiples of `keep_every`.

    keep_every: 0 keeps none for good.
    """
    ordered = sorted(steps)
    return [
        step
        for step in ordered[: max(0, len(ordered) - keep_last)]
        if not keep_every or step % keep_every
    ]
