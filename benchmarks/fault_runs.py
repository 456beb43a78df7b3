"""One run of a faulty job: its files, its processes, and what came of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import fault_launch
from benchmarks.fault_job import INJECTED, Fault, run
from benchmarks.fault_kinds import (
    DATA,
    DISK,
    EVERY,
    HANG_S,
    NUM_PROCESSES,
    RUNS,
    STEPS,
    TIMEOUT_S,
    Kind,
)
from ilm_compile.runtime.data import write_shard
from ilm_compile.runtime.guard.ending import read_ending

RUN_LIMIT_S = 180.0
LEFT_S = 40.0  # in which the ranks of a dead launcher must be gone
JOB = "job"
CONFIG = f"""
job_name = "{JOB}"
[model]
type = "INTERNLM2"
num_layers = 2
hidden_size = 32
num_attention_heads = 4
num_kv_attention_heads = 2
vocab_size = 64
mlp_ratio = 2.0
[parallel]
pipeline = {NUM_PROCESSES}
[train]
total_steps = {STEPS}
timeout_s = {TIMEOUT_S}
[data]
type = "tokenized"
seq_len = 32
micro_num = 2
[optimizer]
lr = 1e-2
[ckpt]
every = {EVERY}
[monitor]
hang_s = {HANG_S}
grace_s = 20.0
min_free_gib = 0.0
"""
# Who noticed, by what the first message says.
NOTICED_BY = (
    (r"does not answer|busy in|every rank waits", "watchdog"),
    (r"left out", "checksums at load"),
    (r"token file", "data reader"),
    (r"differ from rank 0", "agreement at start"),
    (r"did not come within", "rendezvous"),
    (r"expected a multiple of", "check before start"),
    (r"No space left", "writer, told to all ranks"),
    (r"SIGTERM|asked for by", "monitor"),
    (r"step skipped", "gradient norm, on all ranks"),
    (r"ZeroDivisionError", "the rank itself"),
    (r"(?i)connection|reset by peer|broken pipe|closed", "connection of a peer"),
    (r"SIGKILL", "launcher"),
)
MESSAGES = (
    r"checkpoint of step \d+ is left out: .*",
    r"ilm-compile: .*",
    r".*step skipped.*",
    r"(torch\.\S+|\w+)?Error: .*",
    r"process \d+ terminated with signal \w+",
)


@dataclass
class Outcome:
    """One run. seconds: from the injection to what noticed it, and to the end of all processes."""

    code: int
    ranks: dict[str, int]
    message: str
    noticed_by: str
    noticed_s: float | None
    gone_s: float | None
    last_step: int
    left: int
    timed_out: bool


def write_data(folder: Path) -> None:
    """Twenty documents of random tokens."""
    folder.mkdir()
    random = Random(0)
    documents = [[random.randrange(1, 64) for _ in range(40)] for _ in range(20)]
    write_shard(folder / "a.bin", documents)


def prepare(folder: Path, work: Path, template: Path | None = None) -> None:
    """The folder of an experiment: data, config, and the runs of `template`."""
    folder.mkdir()
    shutil.copytree(work / DATA, folder / DATA)
    (folder / "job.toml").write_text(CONFIG)
    if template is not None:
        shutil.copytree(template / RUNS, folder / RUNS)


def run_job(
    folder: Path,
    fault: Fault | None,
    settings: list[str],
    *,
    num_processes: int = NUM_PROCESSES,
    max_restarts: int = 0,
) -> Generator[Callable[[], bool], None, Outcome]:
    """Start the job, wait for it and for its ranks; the generator's value is the `Outcome`."""
    place = folder / f"run-{1 + len(list(folder.glob('run-*')))}"
    place.mkdir()
    overrides = [f"logging.folder={folder / RUNS}", f"data.train_folder={folder / DATA}", *settings]
    options = [part for text in overrides for part in ("--set", text)]
    launcher = fault_launch.start(
        run,
        (folder / "job.toml", options, fault, place),
        num_processes=num_processes,
        max_restarts=max_restarts,
        folder=place,
    )
    deadline = time.monotonic() + RUN_LIMIT_S
    status: list[int] = []

    def is_over() -> bool:
        if not status:
            pid, code = os.waitpid(launcher, os.WNOHANG)
            if pid:
                status.append(os.waitstatus_to_exitcode(code))
        return bool(status) or time.monotonic() > deadline

    yield is_over
    timed_out = not status
    limit = time.monotonic() + LEFT_S
    yield lambda: not _alive(place) or time.monotonic() > limit
    gone_at = time.time()
    left = _alive(place)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if timed_out:
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
    return _outcome(folder, place, status[0] if status else -9, gone_at, len(left), timed_out)


def _outcome(
    folder: Path, place: Path, code: int, gone_at: float, left: int, timed_out: bool
) -> Outcome:
    ending = read_ending(folder / RUNS / JOB)
    log = (place / fault_launch.LOG).read_text(errors="replace")
    injected_at = float((place / INJECTED).read_text()) if (place / INJECTED).exists() else None
    message = _message(log)
    noticed_at = gone_at
    if ending is not None and ending["how"] != "finished":
        noticed_at = ending["time"]
        message = ending["reason"]
    noticed_by = next((who for pattern, who in NOTICED_BY if re.search(pattern, message)), "-")
    return Outcome(
        code=code,
        ranks=fault_launch.codes(place),
        message=re.sub(r" \[/\S+\]", "", message.replace(str(folder), "")),
        noticed_by=noticed_by,
        noticed_s=None if injected_at is None else noticed_at - injected_at,
        gone_s=None if injected_at is None else gone_at - injected_at,
        last_step=max(curve(folder), default=0),
        left=left,
        timed_out=timed_out,
    )


def _message(log: str) -> str:
    for pattern in MESSAGES:
        if match := re.search(pattern, log):
            return match[0].strip()
    return ""


def _alive(place: Path) -> list[int]:
    """The ranks that still run; those that nobody has waited for yet do not count."""
    found = []
    for pid in fault_launch.pids(place):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.append(pid)
    return found


def newest_complete(folder: Path, kind: Kind) -> int:
    """The step of the newest checkpoint that has a manifest, 0 for none."""
    place = folder / DISK if kind.disk else folder / RUNS / JOB / "checkpoints"
    complete = place.glob("step-????????/manifest.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in complete), default=0)


def resumed(place: Path) -> int:
    """The step after which a run went on, by its own words; 0 for a new one."""
    match = re.search(r"resumed after step (\d+)", (place / fault_launch.LOG).read_text())
    return int(match[1]) if match else 0


def curve(folder: Path) -> dict[int, Any]:
    """The metrics of each step so far."""
    path = folder / RUNS / JOB / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line for line in lines if "group" not in line}
