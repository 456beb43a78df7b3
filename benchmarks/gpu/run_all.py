"""Checks and times everything that needs a GPU: `python -m benchmarks.gpu.run_all`.

One process, one GPU, under eight minutes. Each section has a budget of seconds; one that fails or
runs out of it leaves its traceback in the JSON, and the next one starts. The file is written anew
after every section, so that a run that is cut short keeps what it had.

    --device cpu --smoke    the same code on tiny sizes, to test this script without a GPU
"""

from __future__ import annotations

import argparse
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import RESULTS, make_console, save_json
from benchmarks.gpu import precision, tests, throughput
from ilm_compile.errors import IlmCompileError


@dataclass(frozen=True, slots=True)
class Section:
    """run(device, smoke) returns what goes into the JSON. budget_s: seconds it may take."""

    run: Callable[[torch.device, bool], dict[str, Any]]
    budget_s: float


SECTIONS: dict[str, Section] = {
    "equality": Section(precision.equality, 60),
    "bfloat16": Section(precision.bfloat16, 60),
    "throughput": Section(throughput.throughput, 210),
    "gpu_tests": Section(tests.gpu_tests, 120),
}


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
        save_json(path, {"device": str(device), "smoke": smoke, "sections": found})
        outcome = "ok" if found[name]["ok"] else f"failed: {found[name]['error'].splitlines()[-1]}"
        console.print(f"  {outcome}, {found[name]['seconds']:.1f} s", markup=False)
    return found


def _run_section(section: Section, device: torch.device, *, smoke: bool) -> dict[str, Any]:
    start = time.perf_counter()
    found: dict[str, Any] = {"ok": True}
    try:
        with time_limit(section.budget_s):
            found["result"] = section.run(device, smoke)
    except Exception:
        found |= {"ok": False, "error": traceback.format_exc()}
    found["seconds"] = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` inside the block after `seconds`; in the main thread only."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the section took longer than its budget of {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu.run_all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, no tests")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="may be repeated")
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
    path = options.output / f"gpu-{date}.json"
    console = make_console()
    sections = {name: SECTIONS[name] for name in options.only or SECTIONS}
    device = torch.device(options.device)
    found = run_sections(sections, device, path, smoke=options.smoke, console=console)
    console.print(f"written to {path}")
    failed = [name for name, section in found.items() if not section["ok"]]
    if failed:
        raise IlmCompileError(f"gpu: expected every section to pass, failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
