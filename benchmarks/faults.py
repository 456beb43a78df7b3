"""Faults injected for real into small trainings: who notices, after how long, what is lost.

    python -m benchmarks.faults [--repetitions 2] [--only WORD ...] [--seed 0] [--jobs 3]

Every fault hits a training of two ranks (a pipeline over gloo) from a config, at a moment drawn
from the seed. Then the training is started again; it must go on from the newest complete
checkpoint and end with the losses and gradient norms of the undisturbed run, bit by bit. Writes
``benchmarks/results/faults.json``; the exit code is 1 if any expectation failed.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from benchmarks.common import RESULTS, make_parser, save_json, show_table
from benchmarks.fault_job import INJECTED, Fault
from benchmarks.fault_kinds import (
    DATA,
    DISK,
    EVERY,
    HALF,
    HANG_S,
    KINDS,
    NUM_PROCESSES,
    RUNS,
    STEPS,
    TIMEOUT_S,
    Kind,
    mount_disk,
    unmount_disk,
)
from benchmarks.fault_runs import (
    JOB,
    RUN_LIMIT_S,
    Outcome,
    curve,
    newest_complete,
    prepare,
    resumed,
    run_job,
    write_data,
)
from ilm_compile.training import agreement

SAME = ("loss", "grad_norm", "lr")


@dataclass
class Trial:
    """One fault and the run after it. problems: what was not as it should be."""

    kind: str
    fault: Fault | None
    first: Outcome
    second: Outcome
    resumed: int
    lost_steps: int
    problems: list[str] = field(default_factory=list)


Experiment = Iterator[Callable[[], bool]]


def main() -> int:
    """Run the experiments a few at a time and show the table."""
    parser = make_parser("faults", __doc__)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="faults whose name has a WORD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=3, help="experiments at a time")
    parser.add_argument("--output", type=Path, default=RESULTS / "faults.json")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the runs")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="ilm_faults_"))
    print(f"in {work}", flush=True)
    write_data(work / DATA)
    agreement.code_digest()  # once, for all: the sources may change while this runs
    chosen = [k for k in KINDS if not options.only or any(word in k.name for word in options.only)]
    needs_half = any(kind.from_half for kind in chosen)
    _finish([_reference(work), *([_half(work)] if needs_half else [])], jobs=2)
    expected = curve(work / "reference")
    assert sorted(expected) == list(range(1, STEPS + 1)), "the undisturbed run did not finish"
    trials: list[Trial] = []
    experiments = [
        _experiment(work, kind, number, options.seed, expected, trials)
        for number in range(options.repetitions)
        for kind in chosen
    ]
    start = time.monotonic()
    _finish(experiments, jobs=options.jobs)
    by_kind = {kind.name: [t for t in trials if t.kind == kind.name] for kind in chosen}
    rows = [_row(found) for found in by_kind.values() if found]
    _show(rows)
    trials = [trial for found in by_kind.values() for trial in found]
    for trial in trials:
        for problem in trial.problems:
            print(f"PROBLEM {trial.kind} {trial.fault}: {problem}")
    content = {
        "setting": {
            "processes": NUM_PROCESSES, "steps": STEPS, "save_every": EVERY, "hang_s": HANG_S,
            "timeout_s": TIMEOUT_S, "seed": options.seed, "repetitions": options.repetitions,
            "seconds": round(time.monotonic() - start, 1),
        },
        "rows": rows,
        "trials": trials,
    }  # fmt: skip
    save_json(options.output, content)
    bad = any(trial.problems for trial in trials)
    if not bad and not options.keep:
        shutil.rmtree(work)
    return int(bad)


def _finish(experiments: list[Experiment], *, jobs: int) -> None:
    """Run all, `jobs` at a time: each yields what it waits for."""
    waiting, running = list(reversed(experiments)), list[tuple[Experiment, Callable[[], bool]]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            experiment = waiting.pop()
            if (done := next(experiment, None)) is not None:
                running.append((experiment, done))
        time.sleep(0.05)
        still = []
        for experiment, done in running:
            follows: Callable[[], bool] | None = done
            if done():
                follows = next(experiment, None)
            if follows is not None:
                still.append((experiment, follows))
        running = still


def _reference(work: Path) -> Experiment:
    prepare(work / "reference", work)
    yield from run_job(work / "reference", None, [])


def _half(work: Path) -> Experiment:
    prepare(work / "half", work)
    yield from run_job(work / "half", Fault("terminate rank", "step", step=HALF), [])


def _experiment(
    work: Path,
    kind: Kind,
    number: int,
    seed: int,
    expected: dict[int, Any],
    trials: list[Trial],
) -> Experiment:
    random = Random(f"{seed} {number} {kind.name}")
    slug = re.sub(r"\W+", "-", kind.name)
    folder = work / f"{slug}-{number}"
    prepare(folder, work, work / "half" if kind.from_half else None)
    if kind.disk and not mount_disk(folder / DISK):
        print(f"{kind.name}: left out, only root may mount a file system")
        return
    try:
        fault = None if kind.draw is None else kind.draw(random)
        if kind.damage is not None:
            kind.damage(folder, random)
        settings = ["ckpt.folder=local:" + str(folder / DISK)] if kind.disk else []
        first = yield from run_job(
            folder,
            fault,
            [*settings, *kind.options],
            num_processes=kind.num_processes,
            max_restarts=kind.max_restarts,
        )
        newest = newest_complete(folder, kind)
        before = (folder / RUNS / JOB / "metrics.jsonl") if first.last_step else None
        if before is not None:
            shutil.copy(before, folder / "metrics-before.jsonl")
        if kind.repair is not None:
            kind.repair(folder)
        second = first  # torchrun has started it again already
        if not kind.max_restarts:
            second = yield from run_job(folder, None, settings)
        trial = Trial(kind.name, fault, first, second, newest, max(0, first.last_step - newest))
        if kind.survives:
            goes_on = kind.from_half or kind.max_restarts
            trial.resumed = resumed(folder / "run-1") if goes_on else 0
            trial.lost_steps = HALF - trial.resumed if kind.from_half else 0
        trial.problems = list(_problems(trial, kind, folder, expected, newest))
        trials.append(trial)
        print(f"{'BAD ' if trial.problems else 'ok  '} {kind.name}: {first.message}", flush=True)
    finally:
        if kind.disk:
            unmount_disk(folder / DISK)


def _problems(
    trial: Trial, kind: Kind, folder: Path, expected: dict[int, Any], newest: int
) -> Iterator[str]:
    """What of the promises was broken."""
    first, second = trial.first, trial.second
    for name, outcome in (("first", first), ("second", second)):
        if outcome.timed_out:
            yield f"the {name} run did not end within {RUN_LIMIT_S:g} s"
        if outcome.left:
            yield f"the {name} run left {outcome.left} processes"
    if second.code != 0:
        yield f"the second run ended with {second.code}: {second.message}"
    if kind.survives and first.code != 0:
        yield f"the first run ended with {first.code}: {first.message}"
    was_injected = trial.fault is None or (folder / "run-1" / INJECTED).exists()
    if not was_injected and first.code != 0:
        yield "the fault was not injected and the run failed"
    is_silent = was_injected and not kind.survives and not kind.may_pass
    if is_silent and first.last_step == STEPS and first.code == 0:
        yield "the fault was injected and the run went on as if nothing were wrong"
    if not kind.survives and was_injected and first.last_step:
        if resumed(folder / "run-2") != newest:
            yield f"resumed after step {resumed(folder / 'run-2')}, {newest} was complete"
    if first.last_step - newest > 2 * EVERY and not kind.survives:
        yield f"lost {first.last_step - newest} steps, saved every {EVERY}"
    found = curve(folder)
    skipped = sorted(step for step, line in found.items() if line["is_skipped"])
    if len(skipped) != kind.skips:
        yield f"expected {kind.skips} skipped steps, got {skipped}"
    until = min([STEPS + 1, *skipped])
    for step in range(1, until):
        if any(found.get(step, {}).get(key) != expected[step][key] for key in SAME):
            yield f"step {step}: another loss or gradient norm than in the undisturbed run"
            break
    if sorted(found) != list(range(1, STEPS + 1)):
        yield f"expected steps 1 to {STEPS}, got {sorted(found)}"


def _row(trials: list[Trial]) -> dict[str, Any]:
    """One line of the table."""
    noticed = [t.first.noticed_s for t in trials if t.first.noticed_s is not None]
    gone = [t.first.gone_s for t in trials if t.first.gone_s is not None]
    seen = [t.first for t in trials if t.fault is None or t.first.noticed_s is not None]
    return {
        "fault": trials[0].kind,
        "trials": len(trials),
        "injected": len(seen),
        "noticed_by": sorted({outcome.noticed_by for outcome in seen}),
        "noticed_s_median": round(median(noticed), 2) if noticed else None,
        "noticed_s_max": round(max(noticed), 2) if noticed else None,
        "all_gone_s_max": round(max(gone), 2) if gone else None,
        "lost_steps_max": max(trial.lost_steps for trial in trials),
        "exit_codes": sorted({outcome.code for outcome in seen}),
        "rank_exit_codes": sorted({c for outcome in seen for c in outcome.ranks.values()}),
        "message": seen[0].message if seen else "",
        "problems": sum(len(trial.problems) for trial in trials),
    }


def _show(rows: list[dict[str, Any]]) -> None:
    columns = "fault, by, noticed s, max, gone s, lost, codes, ranks, bad, message".split(", ")
    times = ("noticed_s_median", "noticed_s_max", "all_gone_s_max")
    rest = ("lost_steps_max", "exit_codes", "rank_exit_codes", "problems")
    lines = [
        (
            *(row["fault"], ", ".join(row["noticed_by"])),
            *("-" if row[name] is None else row[name] for name in (*times, *rest)),
            row["message"][:90],
        )
        for row in rows
    ]
    show_table(None, columns, lines)


if __name__ == "__main__":
    sys.exit(main())
