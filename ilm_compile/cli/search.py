"""Find the fastest plan of a model on a number of devices, predicted, and say why not another.

ilm-compile plan internlm2_7b --gpus 64 --hardware h100 --tokens-per-batch 4M --seq 4096
Nothing is run. The fastest plan that the model compiles with, and passes the type check, is written
as JSON, which the other commands take as --plan.
"""

import argparse
import re
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ilm_compile.automatic import first_compiled
from ilm_compile.cli.job import Job, read_model
from ilm_compile.cli.model import add_model_argument
from ilm_compile.cost.hardware import HARDWARE
from ilm_compile.errors import IlmCompileError
from ilm_compile.files import write_text
from ilm_compile.partitioning import partition
from ilm_compile.planner import Candidate, Rejected, Search, search
from ilm_compile.planner.report import write_report
from ilm_compile.program.byte_sizes import read_bytes
from ilm_compile.program.program import Program
from ilm_compile.prove import verify
from ilm_compile.training.fits import changed_keys

BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
TRACED_TOKENS = 128  # sizes do not depend on them
WIDTH = 160  # of the table, whatever a terminal makes of it
LINES = 20  # of those why not, without --all
LEGEND = (
    "micro-batches: how many of how many sequences a data-parallel rank has; GiB: of the fullest "
    "rank; bubble, exposed: shares of the step in which a rank waits for its turn, and for "
    "communication that nothing hides"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_argument(parser)
    parser.add_argument("--gpus", type=int, required=True, metavar="N")
    parser.add_argument(
        "--hardware", default="h100", help=f"{', '.join(HARDWARE)}, or a .toml file (h100)"
    )
    parser.add_argument(
        "--tokens-per-batch", required=True, metavar="N", help="of one step; 4M is 4 * 2**20"
    )
    parser.add_argument("--seq", type=int, required=True, metavar="N", help="tokens of a sequence")
    parser.add_argument(
        "--memory", metavar="N", help="of a device, such as 80GiB; else the hardware's"
    )
    parser.add_argument("--precision", default="bf16", help="bf16, fp16 or fp32 (bf16)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="plans shown (10)")
    parser.add_argument("--all", action="store_true", help="every reason why not")
    parser.add_argument("--verify", action="store_true", help="prove the plan that is written")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows it all")
    parser.add_argument("--output", type=Path, default=Path("plan.json"), metavar="FILE")


def run(options: argparse.Namespace) -> None:
    """Search, print, and write the fastest plan that compiles."""
    tokens = number("--tokens-per-batch", options.tokens_per_batch)
    memory = None if options.memory is None else read_bytes(options.memory, "--memory")
    job = read_model(options.model)
    small = job if job.config else job.with_micro_batch(1, TRACED_TOKENS)
    found = search(
        small.trace(),
        options.gpus,
        options.hardware,
        tokens_per_batch=tokens,
        seq=options.seq,
        memory=memory,
        precision=options.precision,
    )
    best, program, failed = _compiled(job, found)
    console = Console(width=max(Console().width, WIDTH), soft_wrap=True)
    console.print(_table(found, options.top))
    console.print(LEGEND, style="dim")
    lines = [*failed, *found.why_not()]
    shown = lines if options.all else lines[:LINES]
    console.print("\nWhy not:")
    for line in shown:
        console.print(f"  {line.what}: {line.reason}", markup=False, highlight=False)
    if len(shown) < len(lines):
        console.print(f"  and {len(lines) - len(shown)} more: --all")
    proof = _proven(job, found, best) if options.verify else ""
    if proof:
        console.print(f"\n{proof}", markup=False, highlight=False)
    write_text(options.output, found.plan_of(best).to_json() + "\n")
    console.print(f"\n{options.output}: {best.name}", markup=False, highlight=False)
    console.print(_next(options, job, best), markup=False, highlight=False)
    if options.html:
        write_report(options.html, found=found, program=program, failed=failed, proof=proof)
        console.print(f"{options.html}: the report", markup=False, highlight=False)


def _next(options: argparse.Namespace, job: Job, best: Candidate) -> str:
    """The commands that show more of the plan and prove it; of a config, the one that runs it."""
    if job.config:
        keys = changed_keys(job.config, best)
        given = "".join(f" --set {key}={value}" for key, value in keys)
        return f"next: ilm-compile train --config {options.model}{given}"
    rows = int(best.plan.micro_batch * best.plan.ep)
    given = f"--plan {options.output} --seq-len {options.seq} --rows {rows}"
    commands = (f"ilm-compile {name} {options.model} {given}" for name in ("explain", "verify"))
    return "next: " + "\n      ".join(commands)


def number(option: str, text: str) -> int:
    """Return the number of a text such as 4M; raises `IlmCompileError` for another."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2] not in BINARY or not float(match[1]):
        known = ", ".join(unit for unit in BINARY if unit)
        raise IlmCompileError(
            f"{option}: expected a number above 0 and one of {known}, got {text!r}"
        )
    return round(float(match[1]) * BINARY[match[2]])


def _proven(job: Job, found: Search, best: Candidate) -> str:
    """What the proof of a plan says; raises `VerificationError` if it does not hold."""
    job = _as_planned(job, best)
    report = verify(
        job.model,
        example_inputs=job.example_inputs,
        loss_fn=job.loss_fn,
        plan=found.plan_of(best),
    )
    report.raise_if_failed()
    return str(report)


def _compiled(job: Job, found: Search) -> tuple[Candidate, Program, list[Rejected]]:
    """The fastest that compiles, its program, and those before it with what was wrong."""

    def compile_it(candidate: Candidate) -> Program:
        planned = _as_planned(job, candidate)
        return partition(
            job.model,
            example_inputs=planned.example_inputs,
            loss_fn=job.loss_fn,
            plan=found.plan_of(candidate),
        )

    choices = (found.best, *found.candidates[1:])
    best, program, failed = first_compiled(choices, compile_it)
    return best, program, [Rejected(c.name, f"does not compile: {why}") for c, why in failed]


def _as_planned(job: Job, candidate: Candidate) -> Job:
    plan = candidate.plan
    return job.with_micro_batch(int(plan.micro_batch * plan.ep), plan.seq)


def _table(found: Search, top: int) -> Table:
    asked = found.question
    sizes = asked.sizes
    table = Table(
        title=f"{sizes.parameters / 1e9:.3g}B parameters on {asked.gpus} x {asked.hardware.name}, "
        f"{asked.sequences} sequences of {asked.seq} tokens: {len(found.candidates)} plans fit "
        f"{asked.limit / 2**30:.1f} of {asked.memory_bytes / 2**30:.1f} GiB",
        box=SIMPLE_HEAD,
    )
    columns = ("tp", "cp", "ep", "pp", "dp", "zero", "micro-batches", "schedule", "recompute")
    figures = ("s a step", "tokens/s/GPU", "MFU", "GiB", "bubble", "exposed")
    for name in (*columns, *figures):
        table.add_column(name, justify="left" if name == "schedule" else "right", no_wrap=True)
    for candidate in found.candidates[:top]:
        table.add_row(*_row(candidate))
    return table


def _row(candidate: Candidate) -> list[str]:
    plan, time = candidate.plan, candidate.time
    schedule = plan.schedule if plan.pp > 1 else ""
    again = "" if plan.recompute == "none" else candidate.recompute
    return [
        *(str(size) for size in (plan.tp, plan.cp, plan.ep, plan.pp, plan.dp // plan.ep)),
        str(plan.zero),
        f"{plan.num_microbatches:g} of {plan.micro_batch * plan.ep:g}",
        schedule + (f" x{plan.chunks}" if plan.chunks > 1 else ""),
        again,
        f"{time.total:.3f}",
        f"{candidate.tokens_per_second_per_gpu:,.0f}",
        f"{candidate.mfu:.1%}",
        f"{candidate.memory.total / 2**30:.1f}",
        f"{time.bubble / time.total:.1%}",
        f"{time.exposed / time.total:.1%}",
    ]
