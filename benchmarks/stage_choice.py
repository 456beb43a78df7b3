"""Stages and recompute chosen together, beside a uniform split with uniform recompute, simulated.

    python -m benchmarks.stage_choice --output benchmarks/results/stage_choice.json

Uniform is what other systems do: every stage has as many blocks as the next, and the same share of
each stage's blocks, the smallest that fits, is recomputed. Both are simulated on the same schedule,
with the same seconds and bytes of every block, under the same memory. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

import ilm_compile
from benchmarks.common import RESULTS, make_console, make_model, make_parser, save_json
from benchmarks.partition_time import SEQ, internlm2_7b, llama_70b
from ilm_compile.cost import HARDWARE
from ilm_compile.passes import ChooseStages, order_passes, run_passes
from ilm_compile.passes.standard import plan_passes
from ilm_compile.program.copy import copy_program
from ilm_compile.program.program import Program
from ilm_compile.rewrite.node_cost import step_seconds
from ilm_compile.rewrite.parameter_free import parameter_free_nodes
from ilm_compile.rewrite.stage_choice import WHOLE, Chooser, StageChoice

GIB = 2**30


def internlm2_20b() -> nn.Module:
    """InternLM2-20B, our own model."""
    return make_model("internlm2_20b", {"max_seq_len": SEQ})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, a plan, and the memory of a rank in GiB under which it is tried."""

    name: str
    model: Callable[[], nn.Module]
    plan: dict[str, Any]
    memory: tuple[int, ...]


CASES = (
    Case(
        name="InternLM2-7B",
        model=internlm2_7b,
        plan={"pp": 8, "tp": 1, "num_microbatches": 32, "dp": 8},
        memory=(40, 30, 24, 20),
    ),
    Case(
        name="InternLM2-20B",
        model=internlm2_20b,
        plan={"pp": 8, "tp": 2, "num_microbatches": 32, "dp": 4},
        memory=(60, 40, 30, 26),
    ),
    Case(
        name="Llama-3-70B",
        model=llama_70b,
        plan={"pp": 8, "tp": 8, "num_microbatches": 32, "dp": 4},
        memory=(76, 50, 36, 30),
    ),
)


def chooser_of(traced: Program, plan: dict[str, Any]) -> Chooser:
    """What chooses for a traced program under a plan."""
    program = copy_program(traced)
    program.plan = ilm_compile.make_plan(
        **plan, checkpoint="auto", kernels="triton", dtype=torch.bfloat16
    )
    every = order_passes(plan_passes(program), program.facts)
    step = next(each for each in every if isinstance(each, ChooseStages))
    run_passes(program, every[: every.index(step)])
    clones = parameter_free_nodes(program)
    calls = [node for node in program.calls() if node not in clones]
    cost = step_seconds(program, HARDWARE[program.plan.hardware])
    edges = [0, *step.candidates(program, calls, [cost[node] for node in calls])]
    return step.chooser(program, calls, edges)


class UniformChooser(Chooser):
    """Chooses what other systems do."""

    @classmethod
    def of(cls, other: Chooser) -> UniformChooser:
        """Return one for the same units, schedule and memory."""
        found = cls.__new__(cls)
        found.__dict__.update(other.__dict__)
        return found

    def best(self) -> StageChoice:
        """As many blocks in every stage, and the smallest share of them recomputed that fits."""
        begins: dict[int, int] = {}
        for index, unit in enumerate(self.units):
            for part in unit.parts:
                if part.can_recompute:
                    begins.setdefault(part.region, index)
        first, stages = list(begins.values()), self.schedule.num_stages
        cuts = tuple(first[round(stage * len(first) / stages)] for stage in range(1, stages))
        spans = [range(a, b) for a, b in pairwise((0, *cuts, len(self.units)))]
        regions = [
            list(dict.fromkeys(p.region for p in self._parts(span) if p.can_recompute))
            for span in spans
        ]
        most = max(map(len, regions))
        choices = (
            self.with_ways(cuts, {r: WHOLE for own in regions for r in own[:count]})
            for count in range(most + 1)
        )
        for choice in choices:
            if not choice.too_much:
                break
        return choice


def measure(case: Case) -> list[dict[str, Any]]:
    """Both choices for one model under each memory."""
    inputs = {name: ((1, SEQ), torch.int64) for name in ("input_ids", "labels")}
    chooser = chooser_of(ilm_compile.trace(case.model(), example_inputs=inputs), case.plan)
    rows = []
    for gib in case.memory:
        chooser = chooser.within(gib * GIB)
        found, plain = chooser.best(), UniformChooser.of(chooser).best()
        rows.append(
            {
                "model": case.name,
                "plan": case.plan,
                "memory_gib": gib,
                "chosen": _row(found),
                "uniform": _row(plain),
                "ratio": None if plain.too_much else plain.seconds / found.seconds,
            }
        )
    return rows


def _row(choice: StageChoice) -> dict[str, Any]:
    return {
        "fits": not choice.too_much,
        "seconds": choice.seconds,
        "recomputed": len(choice.recomputed),
        "peaks_gib": [round(peak / GIB, 2) for peak in choice.peaks],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("stage_choice", __doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "stage_choice.json")
    options = parser.parse_args(arguments)
    rows = [row for case in CASES for row in measure(case)]
    console = make_console()
    table = Table(title="simulated seconds of a step; blocks recomputed; fullest rank in GiB")
    for column in ("model", "plan", "memory", "chosen", "uniform", "uniform / chosen"):
        table.add_column(column)
    for row in rows:
        shown = [
            f"{c['seconds']:.3f}, {c['recomputed']}, {max(c['peaks_gib'])}"
            if c["fits"]
            else "does not fit"
            for c in (row["chosen"], row["uniform"])
        ]
        plan = " ".join(f"{name}={value}" for name, value in row["plan"].items())
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        table.add_row(row["model"], plan, f"{row['memory_gib']} GiB", *shown, ratio)
    console.print(table)
    save_json(options.output, {"rows": rows})


if __name__ == "__main__":
    main()
