"""Where the threads of this process stand."""

from __future__ import annotations

import faulthandler
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

# A thread whose innermost Python frame is in one of these files waits for other ranks.
_WAITING = (
    "torch/distributed/",
    "ilm_compile/runtime/p2p.py",
    "ilm_compile/runtime/communicator.py",
    "ilm_compile/runtime/agree.py",
    # On CUDA the host waits where it reads a result.
    "ilm_compile/runtime/trainer.py",
    "torch/cuda/",
)
_SHOWN = 2  # last parts of a path


def dump_stacks(path: Path) -> None:
    """Write the stacks of all threads to a file; a disk that is full is no reason to stay."""
    try:
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError:
        faulthandler.dump_traceback(all_threads=True)


def main_frame() -> FrameType | None:
    """Where the main thread stands."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def stack_text(frame: FrameType | None) -> str:
    """The stack as a traceback prints it."""
    return "" if frame is None else "".join(traceback.format_stack(frame))


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """File, line and function, and whether that is where a rank waits for others."""
    if frame is None:
        return "unknown", False
    file = frame.f_code.co_filename.replace("\\", "/")
    place = f"{'/'.join(file.split('/')[-_SHOWN:])}:{frame.f_lineno} in {frame.f_code.co_name}"
    return place, any(part in file for part in _WAITING)
