"""A search or one plan as one page of HTML that needs nothing else, no script and no file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ilm_compile.cost.hardware import GIB
from ilm_compile.files import write_text
from ilm_compile.planner.candidate import Candidate
from ilm_compile.planner.expected import expect
from ilm_compile.planner.pictures import memory_picture, scatter, step_picture
from ilm_compile.planner.search import Search
from ilm_compile.planner.simulated import SimulatedStep
from ilm_compile.planner.space import Rejected
from ilm_compile.program.program import Program

SHOWN = 20  # rows of a table
_STYLE = """
body { font: 15px/1.5 Helvetica, Arial, sans-serif; color: #1f2933; margin: 0 auto; padding: 1rem;
  max-width: 72rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } svg { max-width: 100%; min-width: 44rem; height: auto; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.2rem 0.6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #d9dee4; }
th:first-child, td:first-child, th.words { text-align: left; }
td.words { white-space: normal; text-align: left; min-width: 14rem; }
pre { background: #f4f6f8; padding: 0.7rem; overflow-x: auto; font-size: 0.8rem; }
.stamp { border: 1px solid #d9dee4; padding: 0.5rem 0.8rem; }
.plans td:first-child { white-space: normal; min-width: 11rem; }
@media (min-width: 50rem) { pre { white-space: pre-wrap; overflow-wrap: anywhere; } }
@media (max-width: 40rem) { th, td { padding: 0.2rem 0.4rem; }
  td.words, .plans td:first-child { min-width: 9rem; } }
@media print { body { max-width: none; } h2, p { break-after: avoid; } .wide { overflow: visible; }
  svg { min-width: 0; } svg, tr { break-inside: avoid; }
  table { font-size: 0.7rem; } th, td { padding: 0.2rem 0.4rem; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; } }
"""
HEADINGS = (*("plan", "s a step", "tokens/s/GPU", "MFU", "GiB", "bubble", "exposed", "optimizer"),)


def write_report(
    path: str | Path,
    *,
    found: Search | None = None,
    program: Program | None = None,
    memory_bytes: float | None = None,
    failed: Sequence[Rejected] = (),
    proof: str = "",
) -> None:
    """Write the page of a search, of a partitioned program, or of both: the plan that was chosen.

    memory_bytes: what a rank may fill, that of the search if it is left out. failed: plans that
    did not compile. proof: what `verify` said; left out, the page says that nothing was proven.
    """
    parts: list[str] = []
    if found is not None:
        memory_bytes = memory_bytes or found.question.limit
        parts += _of_search(found, failed)
    if program is not None:
        parts += _of_program(program, memory_bytes, proof)
    title = "Plan" if found is None else f"Plans for {found.question.gpus} devices"
    page = (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    write_text(Path(path), page)


def _of_search(found: Search, failed: Sequence[Rejected]) -> Iterable[str]:
    asked, best = found.question, found.best
    yield (
        f"<p>{asked.sizes.parameters / 1e9:.3g}B parameters on {asked.gpus} x "
        f"{escape(asked.hardware.name)}, {asked.sequences} sequences of {asked.seq} tokens a "
        f"step, {asked.limit / GIB:.1f} of {asked.memory_bytes / GIB:.1f} GiB a rank. "
        f"{len(found.candidates)} plans fit. The "
        f"fastest is predicted to take <b>{best.time.total:.3f} s</b>, {best.mfu:.1%} of the "
        f"devices' peak: <b>{escape(best.name)}</b>.</p>"
    )
    yield "<h2>The fastest</h2>"
    yield _table(HEADINGS, map(_row, found.candidates[:SHOWN]))
    yield "<h2>All that fit, by time and memory</h2>"
    yield f"<div class='wide'>{scatter(found.candidates, asked.limit)}</div>"
    yield "<h2>Why not another</h2>"
    reasons = [*failed, *found.why_not()]
    yield _table(("plan", "why not"), ((r.what, r.reason) for r in reasons), words=1)


def _of_program(program: Program, memory_bytes: float | None, proof: str) -> Iterable[str]:
    found = expect(program)
    step = found.step
    yield "<h2>Proof</h2>"
    said = f"<pre>{escape(proof)}</pre>" if proof else "Types were checked; nothing was proven."
    yield f"<div class='stamp'>{said}</div>"
    yield "<h2>The step, simulated</h2>"
    yield (
        f"<p>Expected on {escape(str(found))}. The schedule takes {step.seconds * 1e3:.3f} ms, "
        f"{step.bubble:.1%} of that idle, gradients and parameters that nothing hides "
        f"{found.gradients * 1e3:.3f} ms, norm and optimizer {found.optimizer * 1e3:.3f} ms.</p>"
    )
    yield f"<div class='wide'>{step_picture(step)}</div>"
    yield "<h2>Memory of each pipeline rank</h2>"
    cap = max(map(step.peak, range(len(step.static)))) if memory_bytes is None else memory_bytes
    yield f"<div class='wide'>{memory_picture(step, cap)}</div>"
    yield "<h2>Stages</h2>"
    headings = ("stage", "rank", "regions", "forward ms", "backward ms", "weights ms", "kept MiB")
    yield _table(headings, _stage_rows(program, step))
    yield "<h2>What was done, and what is sent</h2>"
    yield f"<pre>{escape(program.explain())}</pre>"
    yield f"<h2>plan.json</h2><pre>{escape(program.plan.to_json())}</pre>"


def _stage_rows(program: Program, step: SimulatedStep) -> Iterable[tuple[str, ...]]:
    names: dict[int, dict[str, None]] = {}
    for node in program.calls():
        if not node.meta.get("clone"):
            region = program.regions[node.meta["region"]].name
            names.setdefault(node.meta.get("stage", 0), {})[region] = None
    ranks = step.simulation.schedule.stage_to_rank
    for stage, times in enumerate(step.times):
        held = list(names.get(stage, {}))
        runs = " to ".join(dict.fromkeys((held[0], held[-1]))) if held else ""
        seconds = (times.forward, times.backward, times.weight)
        kept = f"{step.held[stage].kept / 2**20:,.1f}"
        yield (str(stage), str(ranks[stage]), runs, *(f"{s * 1e3:.3f}" for s in seconds), kept)


def _row(candidate: Candidate) -> tuple[str, ...]:
    time = candidate.time
    shares = (time.bubble, time.exposed, time.optimizer)
    return (
        candidate.name,
        f"{time.total:.3f}",
        f"{candidate.tokens_per_second_per_gpu:,.0f}",
        f"{candidate.mfu:.1%}",
        f"{candidate.memory.total / GIB:.1f}",
        *(f"{share / time.total:.1%}" for share in shares),
    )


def _table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, words: int | None = None
) -> str:
    """A table; `words`: the column that is text and may break."""
    kinds = [" class=words" if place == words else "" for place in range(len(headings))]
    head = "".join(f"<th{k}>{escape(h)}</th>" for k, h in zip(kinds, headings, strict=True))
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    kind = " class=plans" if headings[0] == "plan" else ""
    table = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f"<div class='wide'>{table}</div>"
