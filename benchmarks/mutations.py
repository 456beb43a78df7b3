"""Breaks compiled programs on purpose: `python -m benchmarks.mutations`.

Every fault of `ilm_compile.proof.mutate_program` and `mutate_schedule`, at evenly spread places of
each program, in any of its blocks, for the models and plans of `benchmarks.mutation_cases`; each
mutant is shown to every layer of the proof:

structure   the dialect, every shape and dtype computed anew, the cut into stages
variables   inputs, outputs, parameters, buffers and bounds as the model has them
types       every placement and collective by the rules
schedule    complete, in order, the two ends of each channel agreed, no cyclic wait
regions     each region that the unbroken program does not have, against the traced graph's
precision   no value rounded but by the plan's compute dtype, and there within its error budget
step        two optimizer steps of all ranks, loss, outputs, gradients and weights

A mutant is equivalent if no layer refuses it and its steps, run as they would be launched, are the
unbroken program's to 1e-12. One that no layer refuses and that is not equivalent is missed. The
column "alters" counts the mutants whose steps as launched differ; the others are refused for what a
step cannot show: a wait without end where sends block, a collective that is wrong in type but, for
this value, not in effect, a tied name that is lost. The last tables name each attack that an
earlier proof let through, and every schedule that our check refuses to torch's CSV loader.
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
from benchmarks.common import RESULTS, make_console, make_parser, save_json
from benchmarks.mutation_cases import CASES, make_trial
from benchmarks.torch_schedules import refusal
from ilm_compile.proof import mutate_schedule
from ilm_compile.proof.mutations import (
    LAYERS,
    Verdict,
    judge_all,
    program_mutants,
    schedule_mutants,
)
from ilm_compile.schedule import Schedule, build
from ilm_compile.schedule import check as check_schedule

REASONS = {
    "drop a recompute boundary": "memory only: the same values are kept instead of computed again",
    "move a node to another stage": "another legal cut: what crosses it is relayed",
    "rename two micro-batches": "their gradients are summed in another order",
    "reorder a send": "still in time, and both ends agree on the order",
    "skip a cast": "torch promotes the operand to the same dtype by itself",
    "window in every attention": "the model's own windows are narrower",
    "ignore documents": "positions that go on: rotary ones are relative, and attention sees no "
    "other document",
    "post receives late": "here no two ranks wait for each other",
    "reorder a receive": "posted at another moment, in the same order and in time",
}
ATTACKS = {
    "the epsilon of the last block's norms": ("change an epsilon",),
    "a sliding window in one full-attention layer": ("window in one attention",),
    "attention windowed at 20 tokens in every block": ("window in every attention",),
    "a soft cap or a scale doubled in one late block": ("double a soft cap", "double a scale"),
    "position_ids ignored": ("ignore position ids",),
    "attention_mask ignored": ("ignore an attention mask",),
    "document boundaries ignored": ("ignore documents",),
    "a label of -100 counted as class 0": ("count an ignored label",),
    "ids above those that a proof tried": ("clamp ids",),
    "dropout removed, its rate or its mask changed": (
        *("remove a dropout", "change a dropout rate", "share a dropout mask"),
    ),
    "a frozen weight trained, a trained one frozen": ("train a frozen weight", "freeze a weight"),
    "aliases of a tied weight dropped": ("forget a tied name",),
    "a buffer no longer saved": ("change whether a buffer is saved",),
    "the logits output doubled, or another value": ("double an output", "give another output"),
    "the residual stream cast to bf16": ("round the residual stream",),
    "positions cast to bf16": ("round positions",),
    "the target count cast to bf16": ("round the target count",),
    "rotary tables, a norm's input, logits cast to bf16": (
        *("round rotary tables", "round a norm's input", "round logits"),
    ),
    "the target count doubled or dropped": ("double the target count", "drop the target count"),
    "another value of a buffer": ("change a buffer",),
    "parameters of two blocks swapped": ("swap parameters of two blocks",),
    "a gradient cut": ("cut a gradient", "forget a gradient (tied)"),
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
            table.add_row(item.case, verdict.kind, verdict.what, REASONS.get(verdict.kind, "?"))
    return table


def attacks(judged: Sequence[Judged]) -> Table:
    """What became of each attack on the proof that came before, and the layers that refuse it."""
    columns = ("attack", "mutants", "cases", "equivalent", "missed", "refused by")
    table = Table(*columns, title="Attacks that went through an earlier proof")
    for attack, kinds in ATTACKS.items():
        items = [item for item in judged if item.verdict.kind in kinds]
        outcomes = Counter(item.verdict.outcome for item in items)
        layers = Counter(layer for item in items for layer in item.verdict.caught)
        table.add_row(
            attack,
            str(len(items)),
            str(len({item.case for item in items})),
            str(outcomes["equivalent"]),
            str(outcomes["missed"]),
            ", ".join(f"{layer} {layers[layer]}" for layer in LAYERS if layers[layer]),
        )
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
    parser = make_parser("mutations", __doc__)
    parser.add_argument("--limit", type=int, default=1, help="mutants of a kind in a case (1)")
    parser.add_argument("--only", action="append", choices=CASES, help="a model; may be repeated")
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start = time.perf_counter()
    cases = [(name, plan) for name in options.only or CASES for plan in CASES[name].plans]
    judge: Callable[[tuple[str, dict[str, Any]]], Result] = partial(run_case, options.limit)
    with ProcessPoolExecutor(options.processes) as pool:
        results = []
        for case, result in zip(cases, pool.map(judge, cases), strict=True):
            results.append(result)
            seconds = time.perf_counter() - start
            print(f"{case}: {len(result.judged)} mutants, {seconds:.0f} s", flush=True)
            for item in result.judged:
                if item.verdict.outcome == "missed":
                    print(f"MISSED {item}", flush=True)
    judged = [item for result in results for item in result.judged]
    possible = sum(result.possible for result in results)
    console = make_console()
    table, torch_rows = torch_table()
    for shown in (
        by_kind(judged),
        equivalents(judged),
        ablation(judged),
        attacks(judged),
        table,
    ):
        console.print(shown)
    for item in judged:
        if item.verdict.outcome == "missed":
            console.print(f"MISSED {item}", style="red")
    seconds = time.perf_counter() - start
    models = len({name for name, _ in cases})
    console.print(
        f"{len(judged)} mutants judged of {possible} possible, at most {options.limit} of a kind "
        f"in each of {len(cases)} cases of {models} models; {seconds:.0f} s"
    )
    rows = [_row(item) for item in judged]
    content = {"seconds": seconds, "possible": possible, "torch_csv": torch_rows, "mutants": rows}
    save_json(RESULTS / "mutations.json", content)


if __name__ == "__main__":
    main()
