"""What a step of a compiled program is expected to take, everything in it, and whether it fits.

`simulate_step` with what it leaves out: the sums of gradients over the ranks that work on other
rows, the gathers of what they share, the norm and the optimizer. Where ranks share the cores of a
machine, no step is shorter than their work divided by the cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from ilm_compile.cost import (
    Hardware,
    collective_time,
    hardware_named,
    static_bytes_per_parameter,
)
from ilm_compile.cost.constants import software_named
from ilm_compile.cost.hardware import GIB
from ilm_compile.cost.memory import sharing_ranks
from ilm_compile.planner.simulated import SimulatedStep, simulate_step
from ilm_compile.program.program import Program

# Bytes moved per element in float32: Adam reads four values and writes three, the norm reads a
# gradient and clipping writes it again; adding up a gradient reads two and writes one.
UPDATE_BYTES, SUM_BYTES = 40, 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """Seconds and bytes of one step of all ranks.

    flops: of the model. peak: FLOP/s of a device in the plan's dtype.
    compute: of the schedule, messages between stages with it. gradients: their sums, and the
    gathers of parameters. step: when each pipeline rank computes, and what it holds.
    """

    hardware: Hardware
    num_ranks: int
    tokens: int
    flops: float
    peak: float
    compute: float
    gradients: float
    optimizer: float
    step: SimulatedStep

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.gradients + self.optimizer

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
    step, dp = simulate_step(program, machine), plan.dp or 1
    num_ranks = plan.ranks_per_replica * dp
    crowd = max(1.0, num_ranks / machine.cores) if machine.cores else 1.0
    work = sum(step.simulation.busy) / plan.pp * crowd
    shared = sharing_ranks(plan)
    weights = _weights(step, shared, plan.zero)
    compute = max(step.seconds, work)
    moved = crowd * _gradients(program, weights, shared, machine)
    gradients = moved
    if not machine.cores:  # beside the compute, as far as it hides
        share = software_named("ilm_compile").exposed
        gradients = max(0.0, moved - compute) + share * min(moved, compute)
    again = (plan.num_microbatches - 1) * SUM_BYTES * weights / 4
    update = (UPDATE_BYTES * weights / 4 / shared + again) / machine.usable_bandwidth
    return Expected(
        hardware=machine,
        num_ranks=num_ranks,
        tokens=_tokens(program) * plan.num_microbatches * dp,
        flops=float(program.flops * plan.num_microbatches * dp),
        peak=machine.peak_flops[getattr(torch, plan.dtype or "float32")],
        compute=compute,
        gradients=gradients,
        optimizer=crowd * update + software_named("ilm_compile").host_step_s,
        step=step,
    )


def _tokens(program: Program) -> int:
    """Of one micro-batch: the elements of its first input's first two dimensions."""
    return prod(next(iter(program.inputs.values())).shape[:2])


def _weights(step: SimulatedStep, shared: int, zero: int) -> float:
    """Bytes of the parameters that the fullest rank computes with, as if in float32."""
    each = static_bytes_per_parameter(torch.float32, dp=shared, zero=zero)
    return 4 * max(step.static) / each


def _gradients(program: Program, weights: float, shared: int, hardware: Hardware) -> float:
    if shared == 1:
        return 0.0
    plan = program.plan
    units = sum(region.is_block for region in program.regions) / plan.pp + 1
    stride = plan.ep * plan.tp

    def move(kind: str, num_bytes: float) -> float:
        """Unit by unit, and through a buffer at both ends."""
        one = collective_time(kind, num_bytes / units, shared, hardware, stride=stride)
        return units * one + 2 * num_bytes / hardware.usable_bandwidth

    gathered = weights / 2 if plan.dtype else weights
    times = 2 * plan.num_microbatches if plan.zero == 3 else 1
    return times * move("all_gather", gathered) + move("reduce_scatter", weights)
