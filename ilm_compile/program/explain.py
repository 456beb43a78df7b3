"""What was done to a model and why, as text: `Program.explain()`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import groupby

from torch import fx

from ilm_compile.program.collectives import redistribute
from ilm_compile.program.expert_rows import route
from ilm_compile.program.program import Program
from ilm_compile.program.step_traffic import collectives, predicted_traffic
from ilm_compile.program.traffic import PIECES, Message, Traffic

Row = tuple[str, ...]
HEADINGS = ("collective", "type", "forward", "backward", "because")


def explain(program: Program) -> str:
    """Return the plan, each pass's decisions, what a step sends and keeps, and a table per distinct
    block.

    A block's tables list the parameters with their placement, and the collectives with the bytes
    that each rank sends per micro-batch, forward and backward.
    """
    lines = [f"plan: {_plan(program)}", ""]
    lines += [f"- {sentence}" for sentence in program.decisions]
    lines += [f"! {sentence}" for sentence in program.warnings]
    lines += ["", "bytes that each rank sends per step, predicted:"]
    lines += _table(_step_rows(program))
    if program.region_bytes is not None:
        lines += ["", "bytes that a micro-batch keeps for its backward on each rank, predicted:"]
        lines += _table(_saved_rows(program, program.region_bytes(program)))
    tables = _tables(program)
    for regions in _alike(program, tables):
        parameters, sent = tables[regions[0]]
        lines += ["", _title(program, regions)]
        lines += _table([("parameter", "shape", "placement"), *parameters]) if parameters else []
        lines += _table([HEADINGS, *sent]) if sent else []
    return "\n".join(lines) + "\n"


def _plan(program: Program) -> str:
    plan = program.plan
    axes = [f"{axis}={n}" for axis, n in plan.axes.items() if n > 1 or axis == "tp"]
    parts = [*axes, f"pp={plan.pp}", f"num_chunks={plan.num_chunks}"]
    parts += [f"num_microbatches={plan.num_microbatches}", f"schedule={plan.schedule}"]
    parts += [f"compile={plan.compile}"] if plan.compile else []
    shapes = ", ".join(f"{name} {list(i.shape)}" for name, i in program.inputs.items())
    return f"{' '.join(parts)}; one micro-batch is {shapes}"


def _step_rows(program: Program) -> list[Row]:
    steps = predicted_traffic(program)
    kinds = [*sorted({kind for step in steps for kind in step} - {"p2p"}), "p2p"]
    rows = [
        (f"pipeline rank {rank}", *(_total(step.get(kind, Traffic())) for kind in kinds))
        for rank, step in enumerate(steps)
    ]
    return [("", *kinds), *rows]


def _saved_rows(program: Program, saved: Mapping[tuple[int, int], tuple[int, int]]) -> list[Row]:
    """Return a row for each run of regions of one stage that keep as much."""
    is_repeated = any(again for _, again in saved.values())
    rows: list[Row] = [("", "of each", "of the stage", "made again" if is_repeated else "")]
    for stage in dict.fromkeys(stage for stage, _ in saved):
        own = [(region, size) for (at, region), size in saved.items() if at == stage]
        total = f"{sum(kept for _, (kept, _) in own):,} B"
        for (kept, again), group in groupby(own, lambda each: each[1]):
            title = _title(program, [region for region, _ in group])
            first, last = (f"{size:,} B" if size else "-" for size in (kept, again))
            rows.append((title, first, total, last if is_repeated else ""))
            total = ""
    return rows


def _total(traffic: Traffic) -> str:
    calls = f" in {traffic.calls} calls" if traffic.calls else ""
    return f"{traffic.num_bytes:,} B{calls}" if traffic.num_bytes else "-"


def _tables(program: Program) -> list[tuple[list[Row], list[Row]]]:
    """Return, for each region, the rows of its parameters and of its collectives."""
    nodes: list[list[fx.Node]] = [[] for _ in program.regions]
    for node in program.calls():
        nodes[node.meta["region"]].append(node)
    sent = collectives(program)
    return [
        (
            _parameter_rows(program, region, nodes[region]),
            [_collective_row(program, n, sent[n]) for n in nodes[region] if n in sent],
        )
        for region in range(len(nodes))
    ]


def _alike(program: Program, tables: list[tuple[list[Row], list[Row]]]) -> list[list[int]]:
    """Return the regions, those that hold the same rows together."""
    alike: dict[object, list[int]] = defaultdict(list)
    for index, (parameters, sent) in enumerate(tables):
        key = (program.regions[index].is_block, repr(parameters), repr([r[1:4] for r in sent]))
        alike[key].append(index)
    return list(alike.values())


def _title(program: Program, regions: list[int]) -> str:
    names = [program.regions[index].name for index in regions]
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} alike)"


def _parameter_rows(program: Program, region: int, nodes: list[fx.Node]) -> list[Row]:
    rows: dict[str, Row] = {}
    for node in nodes:
        for value in node.all_input_nodes:
            variable = program.variables.get(str(value.target)) if value.op == "get_attr" else None
            if variable is not None and variable.is_parameter:
                name = variable.name.removeprefix(program.regions[region].name + ".")
                rows[name] = (
                    name,
                    str(list(variable.shape)),
                    variable.layout.text(program.axis_names()),
                )
    return list(rows.values())


def _collective_row(program: Program, node: fx.Node, messages: list[Message]) -> Row:
    if node.target in (redistribute, route):
        kind = f"{node.kwargs['src']} -> {node.kwargs['dst']}"
    else:
        kind = "beside a product" if node.target in PIECES else "inside the loss"
    columns = (_sent([m for m in messages if m.backward == back]) for back in (False, True))
    where = program.source(node).module_path or "top level"
    return (where, kind, *columns, node.meta.get("reason", ""))


def _sent(messages: list[Message]) -> str:
    return " + ".join(f"{m.kind} {_size(m.num_bytes)}" for m in messages) or "-"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.4g} {unit}"


def _table(rows: list[Row]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ([cell.ljust(n) for cell, n in zip(row, widths, strict=True)] for row in rows)
    return ["  " + "  ".join(cells).rstrip() for cells in padded]
