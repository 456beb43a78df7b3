"""What was done to a model and why, as text: `Program.explain()`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import fx

from ilm_compile.program.collectives import redistribute
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.program import Program
from ilm_compile.program.traffic import Message, traffic

HEADINGS = ("collective", "type", "forward", "backward", "because")


def explain(program: Program) -> str:
    """Return the plan, the decisions of each pass, and a table per distinct block.

    A table lists the parameters with their placement, and the collectives with the bytes that each
    rank sends per micro-batch, forward and backward.
    """
    lines = [f"plan: {_plan(program)}", ""]
    lines += [f"- {sentence}" for sentence in program.decisions]
    lines += [f"! {sentence}" for sentence in program.warnings]
    gradients = gradient_nodes(program.graph)
    for regions in _distinct(program):
        lines += ["", _title(program, regions)]
        lines += _table(_parameter_rows(program, regions[0]))
        rows = list(_collective_rows(program, regions[0], gradients))
        lines += _table([HEADINGS, *rows]) if rows else []
    return "\n".join(lines) + "\n"


def _plan(program: Program) -> str:
    plan = program.plan
    parts = [f"tp={plan.tp}", f"pp={plan.pp}", f"num_chunks={plan.num_chunks}"]
    parts += [f"num_microbatches={plan.num_microbatches}", f"schedule={plan.schedule}"]
    shapes = ", ".join(f"{name} {list(i.shape)}" for name, i in program.inputs.items())
    return f"{' '.join(parts)}; one micro-batch is {shapes}"


def _distinct(program: Program) -> list[list[int]]:
    """Return the regions, those that hold the same rows together."""
    gradients = gradient_nodes(program.graph)
    alike: dict[object, list[int]] = defaultdict(list)
    for index, region in enumerate(program.regions):
        collectives = [row[1:4] for row in _collective_rows(program, index, gradients)]
        key = (region.is_block, repr(_parameter_rows(program, index)), repr(collectives))
        alike[key].append(index)
    return list(alike.values())


def _title(program: Program, regions: list[int]) -> str:
    names = [program.regions[index].name for index in regions]
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} alike)"


def _nodes(program: Program, region: int) -> Iterator[fx.Node]:
    return (node for node in program.calls() if node.meta["region"] == region)


def _parameter_rows(program: Program, region: int) -> list[tuple[str, ...]]:
    rows: dict[str, tuple[str, ...]] = {}
    for node in _nodes(program, region):
        for value in node.all_input_nodes:
            variable = program.variables.get(str(value.target)) if value.op == "get_attr" else None
            if variable is not None and variable.is_parameter:
                name = variable.name.removeprefix(program.regions[region].name + ".")
                rows[name] = (name, str(list(variable.shape)), str(variable.placement))
    return [("parameter", "shape", "placement"), *rows.values()] if rows else []


def _collective_rows(
    program: Program, region: int, gradients: set[fx.Node]
) -> Iterator[tuple[str, ...]]:
    for node in _nodes(program, region):
        messages = traffic(node, program.plan.tp, has_gradient=node in gradients)
        if not messages:
            continue
        typed = node.target is redistribute
        kind = f"{node.kwargs['src']} -> {node.kwargs['dst']}" if typed else "inside the loss"
        columns = (_sent([m for m in messages if m.backward == back]) for back in (False, True))
        where = program.source(node).module_path or "top level"
        yield (where, kind, *columns, node.meta.get("reason", ""))


def _sent(messages: list[Message]) -> str:
    return " + ".join(f"{m.kind} {_size(m.num_bytes)}" for m in messages) or "-"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.4g} {unit}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ([cell.ljust(n) for cell, n in zip(row, widths, strict=True)] for row in rows)
    return ["  " + "  ".join(cells).rstrip() for cells in padded]
