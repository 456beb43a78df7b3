"""Breaks compiled programs on purpose: `python -m benchmarks.mutations`.

Every fault of `ilm_compile.verify.mutate_program` and `mutate_schedule`, at evenly spread places of
each program, for several models and plans; each mutant is shown to every layer of the proof:

structure   the dialect, every shape and dtype computed anew, the cut into stages
types       every placement and collective by the rules
schedule    complete, in order, the two ends of each channel agreed, no cyclic wait
step        one training step of all ranks, loss, gradients and weights against the plain model
blocks      the blocks of the full-size program against those that took the step

A mutant is equivalent if no layer refuses it and its step, run as it would be launched, is the
unbroken program's to 1e-12. One that no layer refuses and that is not equivalent is missed. The
column "alters" counts the mutants whose step as launched differs; the others are refused for what a
step cannot show: a wait without end where sends block, or a collective that is wrong in type but,
for this value, not in effect. The cases "deep" have four blocks of which two take the step; faults
are made in the other two. The last table gives every schedule that our check refuses to
torch.distributed.pipelining's CSV loader.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table

import ilm_compile
from benchmarks.common import RESULTS, make_console, save_json
from benchmarks.torch_schedules import refusal
from ilm_compile.compile import make_schedule
from ilm_compile.program.plan import Plan
from ilm_compile.schedule import Schedule, build
from ilm_compile.schedule import check as check_schedule
from ilm_compile.verify import mutate_schedule, zoo
from ilm_compile.verify.mutations import (
    LAYERS,
    Trial,
    Verdict,
    judge_all,
    program_mutants,
    schedule_mutants,
)
from ilm_compile.verify.promote import promoted_float32
from ilm_compile.verify.reference import random_batch

INPUTS = {name: ((2, zoo.SEQ), torch.int64) for name in ("input_ids", "labels")}
DEEP = "internlm2, deep"
PLANS: dict[str, list[dict[str, Any]]] = {
    "internlm2": [
        {"tp": 2},
        {"tp": 2, "sequence_parallel": True},
        {"tp": 2, "dtype": "bfloat16"},
        {"pp": 2, "num_microbatches": 4},
        {"tp": 2, "pp": 2, "checkpoint": True, "num_microbatches": 3},
        {"pp": 2, "num_chunks": 2, "num_microbatches": 4},
    ],
    "internlm": [
        {"tp": 2, "sequence_parallel": True},
        {"pp": 2, "schedule": "gpipe", "num_microbatches": 3},
        {"tp": 2, "pp": 2, "dtype": "bfloat16"},
    ],
    "hf-gpt2": [
        {"tp": 2},
        {"tp": 2, "sequence_parallel": True},
        {"pp": 2, "num_microbatches": 3},
        {"tp": 2, "pp": 2},
    ],
    "hf-llama": [
        {"tp": 2, "sequence_parallel": True},
        {"tp": 2, "pp": 2, "num_chunks": 2, "num_microbatches": 2},
    ],
    DEEP: [{"tp": 2}, {"tp": 2, "sequence_parallel": True, "pp": 2}],
}
REASONS = {
    "drop a recompute boundary": "memory only: the same values are kept instead of computed again",
    "move a node to another stage": "another legal cut: what crosses it is relayed",
    "rename two micro-batches": "their gradients are summed in another order",
    "reorder a send": "still in time, and both ends agree on the order",
    "skip a cast": "torch promotes the operand to the same dtype by itself",
    "post receives late": "here no two ranks wait for each other",
    "reorder a receive": "posted at another moment, in the same order and in time",
}
CSV_SCHEDULES = (("1f1b", 2, 1, 4), ("gpipe", 3, 1, 4), ("interleaved_1f1b", 2, 2, 4))


@dataclass(frozen=True, slots=True)
class Judged:
    """One mutant of one case."""

    case: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Result:
    """The verdicts on one case, and how many mutants there would have been."""

    judged: list[Judged]
    possible: int


def run_case(limit: int, case: tuple[str, dict[str, Any]]) -> Result:
    """Judge the mutants of one model under one plan, at most `limit` of a kind."""
    torch.set_num_threads(1)
    name, plan = case
    trial = make_trial(name, plan)
    words = ", ".join([name, *(f"{key}={value}" for key, value in plan.items())])
    judged = [Judged(words, verdict) for verdict in judge_all(trial, limit=limit)]
    possible = sum(1 for _ in program_mutants(trial.program))
    if trial.schedule.num_ranks > 1:
        possible += sum(1 for _ in schedule_mutants(trial.schedule))
    return Result(judged, possible)


def make_trial(name: str, plan: dict[str, Any]) -> Trial:
    """Compile a model of the zoo; a deep one beside the small one that takes its step."""
    if name == DEEP:
        models = [
            zoo.make_model(partial(zoo.internlm2_tiny, **{**zoo.SIZES, "num_layers": layers}))
            for layers in (4, 2)
        ]
    else:
        models = [zoo.make_model(zoo.MODELS[name])]
    given = Plan(num_microbatches=2).replace(**plan)
    if given.num_chunks > 1:
        given = given.replace(schedule="interleaved_1f1b")
    programs = []
    for model in models:
        compiled = model
        if given.dtype:
            compiled = zoo.make_model(zoo.MODELS[name]).float()
        with promoted_float32():
            programs.append(ilm_compile.partition(compiled, example_inputs=INPUTS, plan=given))
    batch = random_batch(programs[0].inputs, given.num_microbatches, zoo.VOCAB)
    return Trial(programs[0], make_schedule(given), models[0], batch, *programs[1:])


def by_kind(judged: Sequence[Judged]) -> Table:
    """The detection rate of each kind, and which layer refused first."""
    columns = ("fault", "mutants", "alters", "equivalent", "missed", "caught", *LAYERS)
    table = Table(*columns, title="Mutants by kind; under a layer: how many it refused first")
    kinds = dict.fromkeys(item.verdict.kind for item in judged)
    rows = [(kind, [i.verdict for i in judged if i.verdict.kind == kind]) for kind in kinds]
    for kind, verdicts in [*rows, ("all", [item.verdict for item in judged])]:
        outcomes = Counter(verdict.outcome for verdict in verdicts)
        first = Counter(verdict.first() for verdict in verdicts)
        alters = sum(verdict.alters for verdict in verdicts)
        numbers = [alters, outcomes["equivalent"], outcomes["missed"]]
        layers = (str(first[layer] or "") for layer in LAYERS)
        cells = [kind, str(len(verdicts)), *map(str, numbers), _rate(verdicts), *layers]
        table.add_row(*cells, end_section=kind == rows[-1][0])
    return table


def ablation(judged: Sequence[Judged]) -> Table:
    """What each layer alone refuses, and what is left when it is switched off."""
    columns = ("switched off", "caught", "missed", "of which alter the step", "first kinds missed")
    table = Table(*columns, title="The same with each layer switched off in turn")
    verdicts = [item.verdict for item in judged if item.verdict.outcome != "equivalent"]
    for layer in ("none", *LAYERS):
        missed = [v for v in verdicts if v.first(without=layer) is None]
        alter = sum(verdict.alters for verdict in missed)
        kinds = Counter(verdict.kind for verdict in missed).most_common(3)
        table.add_row(
            layer,
            f"{1 - len(missed) / len(verdicts):.1%}",
            str(len(missed)),
            str(alter),
            ", ".join(f"{kind} ({count})" for kind, count in kinds),
        )
    return table


def equivalents(judged: Sequence[Judged]) -> Table:
    """The equivalent mutants by name, with the reason."""
    table = Table("case", "fault", "where", "why it changes nothing", title="Equivalent mutants")
    for item in judged:
        verdict = item.verdict
        if verdict.outcome == "equivalent":
            table.add_row(item.case, verdict.kind, verdict.what, REASONS[verdict.kind])
    return table


def torch_table() -> tuple[Table, list[dict[str, Any]]]:
    """How many of the schedules that our check refuses torch's CSV loader refuses, too."""
    title = f"Schedules that our check refuses, loaded by torch {torch.__version__} (compute_comms)"
    table = Table("fault", "wrong schedules", "accepted by torch", "refused by torch", title=title)
    rows = []
    for kind, places in mutate_schedule.KINDS.items():
        wrong = []
        for name, pp, chunks, count in CSV_SCHEDULES:
            right = build(name, pp=pp, num_chunks=chunks, num_microbatches=count)
            assert refusal(right) is None, "torch refuses a right schedule"
            wrong += [schedule for _, schedule in places(right) if _is_refused(schedule)]
        refused = sum(refusal(schedule) is not None for schedule in wrong)
        rows.append({"fault": kind, "wrong": len(wrong), "refused_by_torch": refused})
        if wrong:
            table.add_row(kind, *map(str, (len(wrong), len(wrong) - refused, refused)))
    total = [sum(row[key] for row in rows) for key in ("wrong", "refused_by_torch")]
    table.add_section()
    table.add_row("all", *map(str, (total[0], total[0] - total[1], total[1])))
    return table, rows


def _is_refused(schedule: Schedule) -> bool:
    try:
        check_schedule(schedule)
    except ilm_compile.ScheduleError:
        return True
    return False


def _rate(verdicts: Iterable[Verdict]) -> str:
    counted = [verdict for verdict in verdicts if verdict.outcome != "equivalent"]
    caught = sum(verdict.outcome == "caught" for verdict in counted)
    return f"{caught / len(counted):.0%}" if counted else "-"


def _row(item: Judged) -> dict[str, Any]:
    """Return a mutant for the file: messages are left out, they name files of this machine."""
    verdict = item.verdict
    return {
        "case": item.case,
        "fault": verdict.kind,
        "where": verdict.what,
        "outcome": verdict.outcome,
        "refused_by": list(verdict.caught),
        "difference": verdict.difference,
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.mutations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--limit", type=int, default=3, help="mutants of a kind in a case (3)")
    parser.add_argument("--only", action="append", choices=PLANS, help="a model; may be repeated")
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start = time.perf_counter()
    cases = [(name, plan) for name in options.only or PLANS for plan in PLANS[name]]
    judge: Callable[[tuple[str, dict[str, Any]]], Result] = partial(run_case, options.limit)
    with ProcessPoolExecutor(options.processes) as pool:
        results = list(pool.map(judge, cases))
    judged = [item for result in results for item in result.judged]
    possible = sum(result.possible for result in results)
    console = make_console()
    table, torch_rows = torch_table()
    for shown in (by_kind(judged), ablation(judged), equivalents(judged), table):
        console.print(shown)
    for item in judged:
        if item.verdict.outcome == "missed":
            console.print(f"MISSED {item}", style="red")
    seconds = time.perf_counter() - start
    console.print(
        f"{len(judged)} mutants judged of {possible} possible, at most {options.limit} of a kind "
        f"in each of {len(cases)} cases; {seconds:.0f} s"
    )
    rows = [_row(item) for item in judged]
    content = {"seconds": seconds, "possible": possible, "torch_csv": torch_rows, "mutants": rows}
    save_json(RESULTS / "mutations.json", content)


if __name__ == "__main__":
    main()
