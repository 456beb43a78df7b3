"""How a job ended: the exit codes of its processes, and a file in the run's folder.

The file is needed beside the codes because torchrun ends with 1 after SIGTERM however well its
workers ended, and with 1 for any code of theirs.
"""

from __future__ import annotations

import json
import time
from enum import IntEnum
from pathlib import Path
from typing import Any

from ilm_compile.files import write_text

ENDING_FILE = "ended.json"


class ExitCode(IntEnum):
    """The exit codes of a training process. A signal that nobody handles gives minus its number.

    OK: the training is finished, or was stopped as asked (SIGTERM, stop file) and has saved;
    ``ended.json`` says which. ERROR: an error, told in the log. USAGE: a command line that argparse
    refuses. HUNG: the watchdog ended the job. ORPHANED: the launcher died and the orderly stop that
    follows took longer than the grace time.
    """

    OK = 0
    ERROR = 1
    USAGE = 2
    HUNG = 81
    ORPHANED = 82


def forget_ending(folder: Path) -> None:
    """A new run begins in `folder`."""
    (folder / ENDING_FILE).unlink(missing_ok=True)


def record_ending(folder: Path, how: str, *, rank: int, reason: str = "", step: int = 0) -> None:
    """Write ``ended.json`` unless an earlier one is there: the first rank to fail knows best why.

    how: "finished", "stopped", "failed" or "hung". step: the last one done. A folder that cannot be
    written is no error here: the job is ending anyway, for a reason that must not be hidden.
    """
    path = folder / ENDING_FILE
    content = {"how": how, "reason": reason, "rank": rank, "step": step, "time": time.time()}
    try:
        if not path.exists():
            write_text(path, json.dumps(content) + "\n")
    except OSError:
        return


def read_ending(folder: Path) -> dict[str, Any] | None:
    """What `record_ending` wrote, None while the job runs or after all its ranks were killed."""
    try:
        found: dict[str, Any] = json.loads((folder / ENDING_FILE).read_text())
    except FileNotFoundError:
        return None
    return found
