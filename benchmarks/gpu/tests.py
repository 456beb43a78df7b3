"""The tests that are marked `gpu`, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ilm_compile.errors import IlmCompileError

ROOT = Path(__file__).parents[2]
NO_TESTS = 5  # pytest's exit code when a selection is empty


def gpu_tests(device: torch.device, smoke: bool) -> dict[str, Any]:
    """How `pytest -m gpu` ended and the end of what it said; collected only, if `smoke`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    if smoke:
        command += ["--collect-only"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tail = (run.stdout + run.stderr)[-4000:]
    if run.returncode not in (0, NO_TESTS):
        raise IlmCompileError(f"gpu tests: expected exit code 0, got {run.returncode}\n{tail}")
    return {"exit_code": run.returncode, "tail": tail}
