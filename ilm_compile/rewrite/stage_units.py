"""A program as `ilm_compile.rewrite.stage_choice` sees it: units with their seconds and bytes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby, pairwise
from math import prod

from torch import fx

from ilm_compile.cost import Hardware, collective_time, held_bytes
from ilm_compile.cost.holding import Holding
from ilm_compile.cost.saved import SavedMemory, Storage
from ilm_compile.program.program import Program
from ilm_compile.rewrite.cut_points import crossing_bytes
from ilm_compile.rewrite.node_cost import node_seconds
from ilm_compile.rewrite.selective import calls_again
from ilm_compile.rewrite.stage_choice import IN_PART, NOTHING, WHOLE, Part, Unit, Way
from ilm_compile.schedule import schedule_of


def stage_units(
    program: Program, calls: Sequence[fx.Node], edges: Sequence[int], hardware: Hardware
) -> list[Unit]:
    """Return what lies between these positions in `calls`, the first being 0.

    Memory that two units save counts for the first, a parameter for each unit that uses it.
    """
    plan = program.plan
    seconds = node_seconds(program, hardware)
    saved = SavedMemory(program)
    splits = schedule_of(plan).splits_backwards
    holding = Holding(program, saved, splits=splits)
    crossing = [*crossing_bytes(calls), 0.0]
    stride = (plan.dp or 1) * prod(plan.axes.values())
    counted: set[Storage] = set()
    units = []
    for start, end in pairwise([*edges, len(calls)]):
        parts = []
        for region, group in groupby(calls[start:end], lambda node: int(node.meta["region"])):
            nodes = list(group)
            times = [seconds[node] for node in nodes]
            ways: dict[str, tuple[Collection[fx.Node], Collection[Storage]]]
            ways = {NOTHING: ((), saved.of(nodes))}
            if program.regions[region].is_block:
                again = calls_again(saved, nodes, plan.axes)
                ways[IN_PART] = again, saved.kept(nodes, again)
                ways[WHOLE] = nodes, saved.inputs_of(nodes)
            parts.append(
                Part(
                    region=region,
                    forward=sum(time.forward for time in times),
                    backward=sum(time.backward for time in times),
                    weight=sum(time.weight for time in times),
                    ways={
                        name: Way(
                            held=holding.of(nodes, kept, counted),
                            again=sum(seconds[node].forward for node in repeated),
                        )
                        for name, (repeated, kept) in ways.items()
                    },
                )
            )
            counted |= {*saved.of(nodes), *saved.inputs_of(nodes)}
        units.append(
            Unit(
                parts=tuple(parts),
                static=_static_bytes(program, calls[start:end]),
                sent=collective_time("p2p", crossing[end], 2, hardware, stride=stride),
            )
        )
    return units


def _static_bytes(program: Program, calls: Sequence[fx.Node]) -> float:
    """Return the bytes of the parameters of these calls, of gradients and optimizer, per rank."""
    used = {n for call in calls for n in call.all_input_nodes if n.op == "get_attr"}
    return sum({str(n.target): held_bytes(program, n) for n in used}.values())
