"""Checks and times everything that needs a GPU, in two commands that end by themselves:

    python -m benchmarks.gpu.run_all checks    within 330 s: what the card can do, is all right
    python -m benchmarks.gpu.run_all speed     within 380 s: how fast it is

One process, one GPU, one JSON file each. A section has a budget of seconds; one that fails or runs
out of it leaves its traceback in the file beside what it had measured, and the next one starts. The
file is written anew after every section. `speed` reads what `checks` left in the same folder: ops
that it found wrong are looked at in full before any bandwidth, and not timed.

    --device cpu --smoke    the same code on tiny sizes, to test this script without a GPU
    --sweep                 instead: launch choices for the backward of rms_norm, timed
"""

from __future__ import annotations

import faulthandler
import gc
import json
import math
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
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import RESULTS, make_console, make_parser, save_json
from benchmarks.gpu import bandwidth, blocks, correctness, guarantees, precision, probe
from benchmarks.gpu.failure import Deadline, OutOfTime, Result, SectionError
from ilm_compile.errors import IlmCompileError


@dataclass(frozen=True, slots=True)
class Section:
    """run(device, smoke, result) fills `result`, which goes into the JSON however it ends.

    budget_s: seconds it may take.
    """

    run: Callable[[torch.device, bool, Result], None]
    budget_s: float


def _sweep(device: torch.device, smoke: bool, result: Result) -> None:
    from benchmarks.gpu.sweep import sweep  # needs triton to be installed

    sweep(device, smoke, result)


def _tests(device: torch.device, smoke: bool, result: Result) -> None:
    """How `pytest -m gpu` ended and the end of what it said; collected only, if `smoke`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["--collect-only"] if smoke else []
    command += [str(path) for path in GPU_TESTS if "mark.gpu" in path.read_text()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    result |= {"exit_code": run.returncode, "tail": (run.stdout + run.stderr)[-4000:]}
    if run.returncode not in (0, NO_TESTS):
        raise SectionError(f"gpu tests: expected exit code 0, got {run.returncode}")


# The most valuable first. kernel_correctness leaves kernels in Triton's cache that the sections
# after it need.
SECTIONS: dict[str, Section] = {
    "probe": Section(probe.probe, 60),
    "kernel_correctness": Section(correctness.kernel_correctness, 95),
    "kernel_guarantees": Section(guarantees.kernel_guarantees, 38),
    "equality": Section(precision.equality, 30),
    "bfloat16": Section(precision.bfloat16, 25),
    "gpu_tests": Section(_tests, 40),
    "blocks": Section(blocks.blocks, 150),
    "bandwidth": Section(bandwidth.bandwidth, 150),
}
WRONG, WRONG_S = "wrong_kernels", 40.0


@dataclass(frozen=True, slots=True)
class Command:
    """What one command runs, and within how many seconds it ends, its start included."""

    sections: tuple[str, ...]
    seconds: float


COMMANDS = {
    "checks": Command((*list(SECTIONS)[:6],), 330),
    "speed": Command(("blocks", "bandwidth"), 380),
}
START_S = 12.0  # imports, and the end
SMOKE_PATIENCE = 4  # times the budget, on a machine that may have other work
SWEEP = {"sweep": Section(_sweep, 400)}
ROOT = Path(__file__).parents[2]
GPU_TESTS = sorted((ROOT / "tests").rglob("test_*.py"))  # to collect all takes a minute
NO_TESTS = 5  # pytest's exit code when a selection is empty
SMI = (
    *("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw"),
    *("power.limit", "temperature.gpu", "clocks_throttle_reasons.active"),
)
PACKAGES = ("triton", "transformers", "liger-kernel", "flash-attn", "quack-kernels", "numpy")


def run_sections(
    sections: Mapping[str, Section],
    device: torch.device,
    path: Path,
    *,
    smoke: bool,
    console: Console,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Run all sections, write `path` after each, and return what was written of them.

    seconds: for all of them; what is left of them may be less than a section's budget.
    """
    found: dict[str, Any] = {}
    deadline = Deadline(seconds * (SMOKE_PATIENCE if smoke else 1))
    for name, section in sections.items():
        budget = min(section.budget_s * (SMOKE_PATIENCE if smoke else 1), deadline.left)
        console.print(f"{name} (at most {budget:.0f} s) ...")
        found[name] = _run_section(section, device, budget, smoke=smoke)
        save_json(path, {**describe(device), "smoke": smoke, "sections": found})
        outcome = "ok" if found[name]["ok"] else f"failed: {found[name]['error'].splitlines()[-1]}"
        console.print(f"  {outcome}, {found[name]['seconds']:.1f} s", markup=False)
    return found


def after_checks(sections: Mapping[str, Section], folder: Path) -> dict[str, Section]:
    """Return `sections` with what the last `checks` in this folder found wrong before bandwidth."""
    written = sorted(folder.glob("gpu-checks-*.json"))
    read = json.loads(written[-1].read_text())["sections"] if written else {}
    earlier = read.get("kernel_correctness", {}).get("result", {})
    if not earlier.get("faults") or "bandwidth" not in sections:
        return dict(sections)
    wrong = {fault["op"] for fault in earlier["faults"]}
    found: dict[str, Section] = {}
    for name, section in sections.items():
        if name == "bandwidth":
            found[WRONG] = Section(partial(correctness.wrong_kernels, earlier), WRONG_S)
            section = Section(partial(bandwidth.bandwidth, wrong=wrong), section.budget_s)
        found[name] = section
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """The device, its driver and clocks now, the versions of packages; None: not installed."""
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
        found["cudnn"] = torch.backends.cudnn.version()
        found["nvidia_smi"] = _nvidia_smi()
    return found


def _nvidia_smi() -> str:
    """Driver, clocks and what holds them back, as nvidia-smi says; why not, where it cannot."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def _run_section(
    section: Section, device: torch.device, budget: float, *, smoke: bool
) -> dict[str, Any]:
    start = time.perf_counter()
    found: dict[str, Any] = {"ok": True, "result": {}}
    try:
        with time_limit(budget):
            section.run(device, smoke, found["result"])
    except SectionError as error:
        found |= {"ok": False, "error": str(error)}
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
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # 0 would be for ever
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("gpu.run_all", __doc__)
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), help="without it: both")
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
    kind = "sweep" if options.sweep else f"gpu-{options.command}" if options.command else "gpu"
    path = options.output / f"{kind}-{date}.json"
    console = make_console()
    command = COMMANDS.get(options.command, Command(tuple(SECTIONS), math.inf))
    names = options.only or command.sections
    sections = SWEEP if options.sweep else {name: SECTIONS[name] for name in names}
    if options.command == "speed":
        sections = after_checks(sections, options.output)
    if math.isfinite(command.seconds):  # an alarm does not reach a host that waits for the device
        patience = SMOKE_PATIENCE if options.smoke else 1
        faulthandler.dump_traceback_later(command.seconds * patience, exit=True)
    found = run_sections(
        sections,
        torch.device(options.device),
        path,
        smoke=options.smoke,
        console=console,
        seconds=command.seconds - START_S,
    )
    faulthandler.cancel_dump_traceback_later()
    console.print(f"written to {path}")
    failed = [name for name, section in found.items() if not section["ok"]]
    if failed:
        raise IlmCompileError(f"gpu: expected every section to pass, failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
