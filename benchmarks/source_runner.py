"""Runs pytest in forks of one process, which has already imported what takes long to import.

    python source_runner.py < requests > answers

A request is a line of JSON: the folder to run in, arguments for pytest, a timeout in seconds. The
answer is one, too: the exit status, None where time ran out, and the output. Nothing of the package
is imported here: each fork imports the one of its folder.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

import pytest

SLOW = (
    "fsspec",
    "networkx",
    "numpy",
    "rich.console",
    "rich.progress",
    "rich.table",
    "safetensors.torch",
    "scipy.optimize",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.testing",
)
CHUNK = 1 << 16


def answer(folder: str, arguments: list[str], timeout: float) -> dict[str, Any]:
    """Run pytest in a fork; with the process group of the fork end all that it has started."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.chdir(folder)
        status = int(pytest.main(arguments))
        sys.stdout.flush()
        os._exit(status)
    os.close(writer)
    output, in_time = _read(reader, time.monotonic() + timeout)
    os.close(reader)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    _, state = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(state)
    return {"status": status if in_time else None, "output": output.decode(errors="replace")}


def _read(reader: int, deadline: float) -> tuple[bytes, bool]:
    """What comes until the other end is closed, and whether that was before the deadline."""
    output = b""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            if not (data := os.read(reader, CHUNK)):
                return output, True
            output += data
    return output, False


def main() -> None:
    sys.path.pop(0)  # this folder
    for name in SLOW:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
