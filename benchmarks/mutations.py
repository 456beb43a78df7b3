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

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import ilm_compile
from benchmarks.common import RESULTS, make_parser, save_json, show_table
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
Line = tuple[object, ...]
CSV_SCHEDULES = (("1f1b", 2, 1, 4), ("gpipe", 3, 1, 4), ("interleaved_1f1b", 2, 2, 4))


@dataclass(frozen=True, slots=True)
class Judged:
    """One mutant of one case."""

    case: str
    verdict: Verdict


def run_case(limit: int, case: tuple[str, dict[str, Any]]) -> tuple[list[Judged], int]:
    """Judge the mutants of one model under one plan, at most `limit` of a kind.

    Returns the verdicts, and how many mutants there would have been.
    """
    torch.set_num_threads(1)
    name, plan = case
    trial = make_trial(name, plan)
    words = ", ".join([name, *(f"{key}={value}" for key, value in plan.items())])
    judged = [Judged(words, verdict) for verdict in judge_all(trial, limit=limit)]
    possible = sum(1 for _ in program_mutants(trial.program))
    if trial.schedule.num_ranks > 1:
        possible += sum(1 for _ in schedule_mutants(trial.schedule))
    return judged, possible


def by_kind(judged: Sequence[Judged]) -> Iterator[Line]:
    """The detection rate of each kind, and which layer refused first."""
    kinds: dict[str, list[Verdict]] = {}
    for item in judged:
        kinds.setdefault(item.verdict.kind, []).append(item.verdict)
    for kind, verdicts in {**kinds, "all": [item.verdict for item in judged]}.items():
        outcomes = Counter(verdict.outcome for verdict in verdicts)
        first = Counter(verdict.first() for verdict in verdicts)
        alters = sum(verdict.alters for verdict in verdicts)
        numbers = [len(verdicts), alters, outcomes["equivalent"], outcomes["missed"]]
        yield (kind, *numbers, _rate(verdicts), *(first[layer] or "" for layer in LAYERS))


def ablation(judged: Sequence[Judged]) -> Iterator[Line]:
    """What each layer alone refuses, and what is left when it is switched off."""
    verdicts = [item.verdict for item in judged if item.verdict.outcome != "equivalent"]
    for layer in ("none", *LAYERS):
        missed = [v for v in verdicts if v.first(without=layer) is None]
        alter = sum(verdict.alters for verdict in missed)
        kinds = Counter(verdict.kind for verdict in missed).most_common(3)
        words = ", ".join(f"{kind} ({count})" for kind, count in kinds)
        yield layer, f"{1 - len(missed) / len(verdicts):.1%}", len(missed), alter, words


def equivalents(judged: Sequence[Judged]) -> Iterator[Line]:
    """The equivalent mutants by name, with the reason."""
    for item in judged:
        verdict = item.verdict
        if verdict.outcome == "equivalent":
            yield item.case, verdict.kind, verdict.what, REASONS.get(verdict.kind, "?")


def attacks(judged: Sequence[Judged]) -> Iterator[Line]:
    """What became of each attack on the proof that came before, and the layers that refuse it."""
    for attack, kinds in ATTACKS.items():
        items = [item for item in judged if item.verdict.kind in kinds]
        outcomes = Counter(item.verdict.outcome for item in items)
        layers = Counter(layer for item in items for layer in item.verdict.caught)
        cases = len({item.case for item in items})
        refused_by = ", ".join(f"{layer} {layers[layer]}" for layer in LAYERS if layers[layer])
        numbers = len(items), cases, outcomes["equivalent"], outcomes["missed"]
        yield attack, *numbers, refused_by


# Title, columns, and the lines.
TABLES = (
    (
        "Mutants by kind; under a layer: how many it refused first",
        ("fault", "mutants", "alters", "equivalent", "missed", "caught", *LAYERS),
        by_kind,
    ),
    ("Equivalent mutants", ("case", "fault", "where", "why it changes nothing"), equivalents),
    (
        "The same with each layer switched off in turn",
        ("switched off", "caught", "missed", "of which alter the step", "first kinds missed"),
        ablation,
    ),
    (
        "Attacks that went through an earlier proof",
        ("attack", "mutants", "cases", "equivalent", "missed", "refused by"),
        attacks,
    ),
)


def refused_by_torch() -> list[dict[str, Any]]:
    """How many of the schedules that our check refuses torch's CSV loader refuses, too."""
    rows = []
    for kind, places in mutate_schedule.KINDS.items():
        wrong = []
        for name, pp, chunks, count in CSV_SCHEDULES:
            right = build(name, pp=pp, num_chunks=chunks, num_microbatches=count)
            assert refusal(right) is None, "torch refuses a right schedule"
            wrong += [schedule for _, schedule in places(right) if _is_refused(schedule)]
        refused = sum(refusal(schedule) is not None for schedule in wrong)
        rows.append({"fault": kind, "wrong": len(wrong), "refused_by_torch": refused})
    return rows


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("mutations", __doc__)
    parser.add_argument("--limit", type=int, default=1, help="mutants of a kind in a case (1)")
    parser.add_argument("--only", action="append", choices=CASES, help="a model; may be repeated")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    cases = [(name, plan) for name in options.only or CASES for plan in CASES[name].plans]
    judged: list[Judged] = []
    possible = 0
    with ProcessPoolExecutor(options.processes) as pool:
        results = pool.map(partial(run_case, options.limit), cases)
        for case, (of_case, count) in zip(cases, results, strict=True):
            judged += of_case
            possible += count
            seconds = time.perf_counter() - start
            print(f"{case}: {len(of_case)} mutants, {seconds:.0f} s", flush=True)
    torch_rows = refused_by_torch()
    for title, columns, lines in TABLES:
        show_table(title, columns, lines(judged))
    numbers = [(row["wrong"], row["refused_by_torch"]) for row in torch_rows]
    every = "all", *map(sum, zip(*numbers, strict=True))
    show_table(
        f"Schedules that our check refuses, loaded by torch {torch.__version__} (compute_comms)",
        ("fault", "wrong schedules", "refused by torch"),
        [*map(dict.values, torch_rows), every],
    )
    for item in judged:
        if item.verdict.outcome == "missed":
            print(f"MISSED {item}")
    seconds = time.perf_counter() - start
    models = len({name for name, _ in cases})
    print(
        f"{len(judged)} mutants judged of {possible} possible, at most {options.limit} of a kind "
        f"in each of {len(cases)} cases of {models} models; {seconds:.0f} s"
    )
    rows = [_row(item) for item in judged]
    content = {"seconds": seconds, "possible": possible, "torch_csv": torch_rows, "mutants": rows}
    save_json(RESULTS / "mutations.json", content)


if __name__ == "__main__":
    main()
