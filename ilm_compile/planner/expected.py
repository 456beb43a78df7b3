"""What a step of a compiled program is expected to take, everything in it, and whether it fits.

`simulate_step` with what it leaves out: the sums of gradients over the ranks that work on other
rows, the gathers of what they share, the norm and the optimizer. Where ranks share the cores of a
machine, no step is shorter than their work divided by the cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from ilm_compile.cost import Hardware, hardware_named, static_bytes_per_parameter
from ilm_compile.cost.data_parallel import (
    Share,
    crowd,
    exposed_seconds,
    moved_seconds,
    on_network,
    optimizer_seconds,
    slowest,
    software_of,
    summing_seconds,
)
from ilm_compile.cost.hardware import GIB
from ilm_compile.cost.memory import sharing_ranks
from ilm_compile.planner.simulated import SimulatedStep, simulate_step
from ilm_compile.program.program import Program


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """Seconds and bytes of one step of all ranks.

    flops: of the model. peak: FLOP/s of a device in the plan's dtype.
    compute: of the schedule, messages between stages with it. gradients: their sums, and the
    gathers of parameters, as far as nothing hides them. slowest: how much longer the slowest of
    several nodes takes. step: when each pipeline rank computes, and what it holds.
    """

    hardware: Hardware
    num_ranks: int
    tokens: int
    flops: float
    peak: float
    compute: float
    gradients: float
    optimizer: float
    slowest: float
    step: SimulatedStep

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.slowest * (self.compute + self.gradients + self.optimizer)

    @property
    def memory(self) -> tuple[float, ...]:
        """Most bytes of each pipeline rank at once, without what its device reserves."""
        return tuple(self.step.peak(rank) for rank in range(len(self.step.static)))

    @property
    def mfu(self) -> float:
        """The model's FLOP/s over the peak of all devices."""
        return self.flops / self.seconds / (self.peak * self.num_ranks)

    def __str__(self) -> str:
        rate = self.tokens / self.seconds
        most = max(self.memory)
        return (
            f"{self.num_ranks} x {self.hardware.name}: {self.seconds:.3g} s a step, {rate:,.0f} "
            f"tokens/s, MFU {self.mfu:.1%}; {most / GIB:.2f} GiB on the fullest rank, of "
            f"{self.hardware.usable_bytes / GIB:.1f}"
        )


def expect(program: Program, hardware: Hardware | None = None) -> Expected:
    """Return what a step of a program that was partitioned takes, on `hardware` or its plan's.

    One rank on each part of the rows where the plan has no dp. Raises `ScheduleError` for a
    schedule that cannot run.
    """
    plan, machine = program.plan, hardware or hardware_named(program.plan.hardware)
    software = software_of(machine)
    machine = on_network(machine, software)
    step, dp = simulate_step(program, machine), plan.dp or 1
    num_ranks = plan.ranks_per_replica * dp
    crowded, share = crowd(num_ranks, machine), _share(program, step)
    compute = max(step.seconds, sum(step.simulation.busy) / plan.pp * crowded)
    moved = crowded * moved_seconds(share, machine, software)
    update = optimizer_seconds(share, machine, software)
    update += summing_seconds(share, machine, software)
    return Expected(
        hardware=machine,
        num_ranks=num_ranks,
        tokens=_tokens(program) * plan.num_microbatches * dp,
        flops=float(program.flops * plan.num_microbatches * dp),
        peak=machine.peak_flops[getattr(torch, plan.dtype or "float32")],
        compute=compute,
        gradients=exposed_seconds(moved, compute, software),
        optimizer=crowded * update,
        slowest=slowest(num_ranks, machine, software),
        step=step,
    )


def _tokens(program: Program) -> int:
    """Of one micro-batch: the elements of its first input's first two dimensions."""
    return prod(next(iter(program.inputs.values())).shape[:2])


def _share(program: Program, step: SimulatedStep) -> Share:
    """What ranks that work on other rows share of the model, of the fullest pipeline rank."""
    plan, ranks = program.plan, sharing_ranks(program.plan)
    each = static_bytes_per_parameter(torch.float32, dp=ranks, zero=plan.zero)
    variables = [variable for variable in program.variables.values() if variable.is_parameter]
    return Share(
        elements=max(step.static) / each,
        units=sum(region.is_block for region in program.regions) / plan.pp + 1,
        parameters=len(variables) / plan.pp,
        ranks=ranks,
        stride=plan.tp,
        width=2 if plan.dtype else 4,
        zero=plan.zero,
        num_microbatches=plan.num_microbatches,
    )
