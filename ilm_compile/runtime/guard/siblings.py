"""Ends a process of the same job that answers no more, such as one that SIGSTOP has stopped.

Its launcher would end it too, but only 30 seconds after SIGTERM (torchrun).
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from ilm_compile.runtime.guard.report import Member

_DUMP_S = 1.0


def this_process(rank: int) -> Member:
    """This process as others see it."""
    return Member(rank, os.getpid(), socket.gethostname())


def end_sibling(member: Member | None, *, parent: int) -> bool:
    """Kill the process if it is on this host and a child of `parent`, as this one is.

    First SIGABRT, on which `faulthandler` dumps its stacks even if native code holds the
    interpreter's lock, then SIGKILL, which also ends stopped processes. Returns whether it did.
    """
    if member is None or member.host != socket.gethostname() or _parent_of(member.pid) != parent:
        return False
    try:
        os.kill(member.pid, signal.SIGABRT)
        time.sleep(_DUMP_S)
        os.kill(member.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _parent_of(pid: int) -> int | None:
    """From Linux's /proc: the number could long be another process's."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("PPid:")), None)
