"""One step of a partitioned program, simulated: when each rank computes, and what it holds.

Seconds come from the roofline of every node, bytes from what autograd would save, and both go
through the very action lists that would run (`ilm_compile.schedule.simulate`). Data-parallel
communication and the optimizer are not in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import fx

from ilm_compile.cost import (
    Hardware,
    collective_time,
    gradient_bytes,
    hardware_named,
    held_bytes,
)
from ilm_compile.cost.data_parallel import software_of
from ilm_compile.cost.holding import Holding
from ilm_compile.cost.layer_time import host_time
from ilm_compile.cost.saved import SavedMemory, Storage
from ilm_compile.files import write_text
from ilm_compile.program.boundaries import stage_boundaries, stage_of, stage_parts
from ilm_compile.program.program import Program
from ilm_compile.rewrite.node_cost import node_seconds, runs_again
from ilm_compile.schedule import Kind, Simulation, StageTimes, schedule_of, simulate
from ilm_compile.schedule.memory import Held, bytes_held

_MARKS = {Kind.F: "F", Kind.B: "B", Kind.W: "W"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStep:
    """What `simulate_step` returns.

    times: of each stage, in seconds. held: bytes of a micro-batch in each stage; static: bytes of
    parameters, gradients and Adam's state on each pipeline rank; gradients: those of each stage,
    which its first backward makes, or its first weight part.
    """

    simulation: Simulation
    times: tuple[StageTimes, ...]
    held: tuple[Held, ...]
    static: tuple[float, ...]
    gradients: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The step, from the first action to the last."""
        return self.simulation.makespan

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which nothing is computed."""
        busy = self.simulation.busy
        return 1 - sum(busy) / (len(busy) * self.seconds) if self.seconds else 0.0

    def memory(self, rank: int) -> list[tuple[float, float]]:
        """Return the bytes that a pipeline rank holds, from which second on each."""
        schedule = self.simulation.schedule
        makes = schedule.frees
        own = {s: self.gradients[s] for s, r in enumerate(schedule.stage_to_rank) if r == rank}
        now = self.static[rank] - sum(own.values())
        found = [(0.0, now)]
        for action, most, after in bytes_held(schedule, rank, self.held):
            span = self.simulation.spans[action]
            found.append((span.start, now + most))
            now += own.pop(action.stage, 0.0) if action.kind is makes else 0.0
            found.append((span.stop, now + after))
        return found

    def peak(self, rank: int) -> float:
        """Return the most bytes that a pipeline rank holds at once."""
        return max(held for _, held in self.memory(rank))

    def grid(self, width: int = 100) -> str:
        """Return the step as text, a row for each rank, in proportion to time.

        A letter is what most of a column is: F, B, W, or a dot where nothing is computed.
        """
        ranks = range(len(self.static))
        scale = self.seconds / width if self.seconds else 1.0
        lines = [f"{self.seconds * 1e3:.3f} ms, {self.bubble:.1%} idle"]
        for rank in ranks:
            cells = ["."] * width
            for action in self.simulation.schedule.actions[rank]:
                if action.is_compute:
                    span = self.simulation.spans[action]
                    for column in range(round(span.start / scale), round(span.stop / scale)):
                        cells[column] = _MARKS[action.kind]
            lines.append(f"rank {rank} {''.join(cells)}  peak {self.peak(rank) / 2**30:.3f} GiB")
        return "\n".join(lines)

    def to_chrome_trace(self, path: str | Path) -> None:
        """Write what chrome://tracing and Perfetto read: a row per rank, and its bytes over time.

        The format is the "JSON Array" one of Google's Trace Event Format.
        """
        write_text(Path(path), json.dumps({"traceEvents": list(self._events())}))

    def _events(self) -> Iterator[dict[str, Any]]:
        for rank, row in enumerate(self.simulation.schedule.actions):
            place = {"pid": 0, "tid": rank}
            yield {"ph": "M", "name": "thread_name", **place, "args": {"name": f"rank {rank}"}}
            for action in row:
                span = self.simulation.spans[action]
                if action.is_compute:
                    at = {"ts": span.start * 1e6, "dur": (span.stop - span.start) * 1e6}
                    yield {"ph": "X", "name": str(action), "cat": action.kind.name, **place, **at}
            for start, held in self.memory(rank):
                name = f"bytes of rank {rank}"
                yield {"ph": "C", "name": name, **place, "ts": start * 1e6, "args": {"held": held}}


def simulate_step(program: Program, hardware: Hardware | None = None) -> SimulatedStep:
    """Return one step of a program that was partitioned, on `hardware`, or on that of its plan.

    All micro-batches of one data-parallel rank, of which every pipeline rank is shown. Raises
    `ScheduleError` for a schedule that cannot run.
    """
    schedule = schedule_of(program.plan)
    hardware = hardware or hardware_named(program.plan.hardware)
    stages, seconds = stage_of(program), node_seconds(program, hardware)
    forward, backward, weight = ([0.0] * schedule.num_stages for _ in range(3))
    for node, stage in stages.items():
        forward[stage] += seconds[node].forward
        again = seconds[node].forward * runs_again(program, node)
        backward[stage] += seconds[node].backward + again
        weight[stage] += seconds[node].weight
    for stage, (begin, back) in enumerate(_host_seconds(program, schedule.num_stages, hardware)):
        forward[stage] = max(forward[stage], begin)
        backward[stage] = max(backward[stage], back - weight[stage])
    sent = _sent_seconds(program, schedule.num_stages, hardware)
    times = tuple(
        StageTimes(forward=f, backward=b, weight=w, message=m)
        for f, b, w, m in zip(forward, backward, weight, sent, strict=True)
    )
    return SimulatedStep(
        simulation=simulate(schedule, times),
        times=times,
        held=tuple(map(Held.together, _parts_held(program, schedule.num_stages))),
        static=tuple(_static_bytes(program, schedule.stage_to_rank, schedule.num_ranks)),
        gradients=tuple(_gradient_bytes(program, schedule.num_stages)),
    )


def _host_seconds(
    program: Program, num_stages: int, hardware: Hardware
) -> list[tuple[float, float]]:
    """Return what the host takes to start the forward and the backward of each stage's blocks."""
    found = [(0.0, 0.0)] * num_stages
    for stage, region, _ in stage_parts(program):
        block = program.regions[region]
        if block.is_block:
            again = "full" if block.recompute else "selective" if block.selective else "none"
            one = host_time(program.plan.tp, software_of(hardware), again)
            found[stage] = (found[stage][0] + one[0], found[stage][1] + one[1])
    return found


def _parts_held(program: Program, num_stages: int) -> list[list[Held]]:
    """Return what the regions of each stage hold."""
    memory = SavedMemory(program)
    holding = Holding(program, memory)
    found: list[list[Held]] = [[] for _ in range(num_stages)]
    counted: list[set[Storage]] = [set() for _ in range(num_stages)]
    for stage, region, nodes in stage_parts(program):
        kept = memory.kept_by(nodes, program.regions[region])
        found[stage].append(holding.of(nodes, kept, counted[stage]))
        counted[stage].update(kept)
    return found


def _sent_seconds(program: Program, num_stages: int, hardware: Hardware) -> list[float]:
    plan = program.plan
    stride = (plan.dp or 1) * prod(plan.axes.values())
    found = [0.0] * num_stages
    for stage, received in enumerate(stage_boundaries(program)):
        if received:
            size = sum(prod(b.shape) * b.dtype.itemsize for b in received.values())
            found[stage - 1] = collective_time("p2p", size, 2, hardware, stride=stride)
    return found


def _static_bytes(program: Program, stage_to_rank: tuple[int, ...], num_ranks: int) -> list[float]:
    held: list[dict[str, float]] = [{} for _ in range(num_ranks)]
    for stage, node in _used(program):
        held[stage_to_rank[stage]][str(node.target)] = held_bytes(program, node)
    return [sum(sizes.values()) for sizes in held]


def _gradient_bytes(program: Program, num_stages: int) -> list[float]:
    """Return those of each stage; of a parameter of two stages on one rank, for the first."""
    found, seen = [0.0] * num_stages, set[tuple[int, str]]()
    for stage, node in sorted(_used(program), key=lambda each: each[0]):
        if (place := (program.rank_of(stage), str(node.target))) not in seen:
            seen.add(place)
            found[stage] += gradient_bytes(program, node)
    return found


def _used(program: Program) -> Iterator[tuple[int, fx.Node]]:
    """Yield each stage with what it uses of the model's tensors."""
    for node in program.graph.find_nodes(op="get_attr"):
        for user in node.users:
            if "stage" in user.meta or not user.meta.get("clone"):
                yield user.meta.get("stage", 0), node
