"""Checks and times everything that needs a GPU: `python -m benchmarks.gpu.run_all`.

One process, one GPU, under eight minutes. Each section has a budget of seconds; one that fails or
runs out of it leaves its traceback in the JSON, and the next one starts. The file is written anew
after every section, so that a run that is cut short keeps what it had.

    --device cpu --smoke    the same code on tiny sizes, to test this script without a GPU
    --sweep                 instead: launch choices for the backward of rms_norm, timed
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import RESULTS, make_console, make_parser, save_json
from benchmarks.gpu import bandwidth, blocks, correctness, guarantees, precision
from benchmarks.gpu.failure import OutOfTime, SectionError
from ilm_compile.errors import IlmCompileError


@dataclass(frozen=True, slots=True)
class Section:
    """run(device, smoke) returns what goes into the JSON. budget_s: seconds it may take."""

    run: Callable[[torch.device, bool], dict[str, Any]]
    budget_s: float


def _sweep(device: torch.device, smoke: bool) -> dict[str, Any]:
    from benchmarks.gpu.sweep import sweep  # needs triton to be installed

    return sweep(device, smoke)


def _tests(device: torch.device, smoke: bool) -> dict[str, Any]:
    """How `pytest -m gpu` ended and the end of what it said; collected only, if `smoke`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    command += ["--collect-only"] if smoke else []
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tail = (run.stdout + run.stderr)[-4000:]
    if run.returncode not in (0, NO_TESTS):
        raise IlmCompileError(f"gpu tests: expected exit code 0, got {run.returncode}\n{tail}")
    return {"exit_code": run.returncode, "tail": tail}


# kernel_correctness leaves kernels in Triton's cache that the sections after it need.
SECTIONS: dict[str, Section] = {
    "equality": Section(precision.equality, 30),
    "bfloat16": Section(precision.bfloat16, 25),
    "kernel_correctness": Section(correctness.kernel_correctness, 100),
    "kernel_guarantees": Section(guarantees.kernel_guarantees, 40),
    "bandwidth": Section(bandwidth.bandwidth, 110),
    "blocks": Section(blocks.blocks, 100),
    "gpu_tests": Section(_tests, 40),
}
SMOKE_PATIENCE = 4  # times the budget, on a machine that may have other work
SWEEP = {"sweep": Section(_sweep, 400)}
ROOT = Path(__file__).parents[2]
NO_TESTS = 5  # pytest's exit code when a selection is empty
PACKAGES = ("triton", "transformers", "liger-kernel", "flash-attn", "quack-kernels", "numpy")


def run_sections(
    sections: Mapping[str, Section],
    device: torch.device,
    path: Path,
    *,
    smoke: bool,
    console: Console,
) -> dict[str, Any]:
    """Run all sections, write `path` after each, and return what was written of them."""
    found: dict[str, Any] = {}
    for name, section in sections.items():
        console.print(f"{name} (at most {section.budget_s:.0f} s) ...")
        found[name] = _run_section(section, device, smoke=smoke)
        save_json(path, {**describe(device), "smoke": smoke, "sections": found})
        outcome = "ok" if found[name]["ok"] else f"failed: {found[name]['error'].splitlines()[-1]}"
        console.print(f"  {outcome}, {found[name]['seconds']:.1f} s", markup=False)
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """The device and the versions of packages; None: not installed."""
    found: dict[str, Any] = {"device": str(device), "versions": {}}
    for package in PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
        found["compute_capability"] = [properties.major, properties.minor]
    return found


def _run_section(section: Section, device: torch.device, *, smoke: bool) -> dict[str, Any]:
    start = time.perf_counter()
    found: dict[str, Any] = {"ok": True}
    try:
        with time_limit(section.budget_s * (SMOKE_PATIENCE if smoke else 1)):
            found["result"] = section.run(device, smoke)
    except SectionError as error:
        found |= {"ok": False, "error": str(error), "result": error.result}
    except (Exception, OutOfTime):
        found |= {"ok": False, "error": traceback.format_exc()}
    found["seconds"] = time.perf_counter() - start
    if device.type == "cuda":
        gc.collect()  # models that refer to themselves
        torch.cuda.empty_cache()
    return found


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` inside the block after `seconds`; in the main thread only."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"the section took longer than its budget of {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("gpu.run_all", __doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, no tests")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", action="append", choices=list(SECTIONS), help="may be repeated")
    which.add_argument("--sweep", action="store_true", help="launch choices, and nothing else")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("OUT", RESULTS)),
        help="folder of the JSON file; without it $OUT, without that benchmarks/results",
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "expected a CUDA device, torch found none; --device cpu --smoke needs none"
        )
    if options.device == "cpu" and torch.cuda.is_available():
        raise SystemExit("--device cpu: hide the GPU first, with CUDA_VISIBLE_DEVICES=''")
    date = datetime.now(UTC).date().isoformat()
    path = options.output / f"{'sweep' if options.sweep else 'gpu'}-{date}.json"
    console = make_console()
    sections = SWEEP if options.sweep else {n: SECTIONS[n] for n in options.only or SECTIONS}
    device = torch.device(options.device)
    found = run_sections(sections, device, path, smoke=options.smoke, console=console)
    console.print(f"written to {path}")
    failed = [name for name, section in found.items() if not section["ok"]]
    if failed:
        raise IlmCompileError(f"gpu: expected every section to pass, failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
