"""A run that died before its first checkpoint: another of its name begins anew in its folder."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

from ilm_compile.config import Config
from ilm_compile.runtime.guard.ending import read_ending
from ilm_compile.runtime.observe.recorders import METRICS_FILE


def died_young(config: Config) -> bool:
    """Whether the run in the config's folder ended before it could have saved.

    Not one that has finished, nor one whose lines are those of more steps than up to a save: its
    checkpoints are somewhere else.
    """
    first_save = config.ckpt.every or config.train.total_steps
    ending = read_ending(config.run_folder)
    has_ended = ending is not None and ending["how"] in ("finished", "stopped")
    return config.ckpt.enabled and not has_ended and steps_told(config.run_folder) <= first_save


def steps_told(folder: Path) -> int:
    """Return the last step that ``metrics.jsonl`` tells of, 0 without one."""
    steps = [0]
    path = folder / METRICS_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue  # cut off, as a killed writer leaves it
    return max(steps)


def set_aside(folder: Path) -> list[str]:
    """Rename the lines of a run that died young; return what to tell of it."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    steps = steps_told(folder)
    free = next(p for n in count(1) if not (p := folder / f"metrics-{n}.jsonl").exists())
    path.rename(free)
    return [f"the run before ended after step {steps} without a checkpoint; see {free.name}"]
