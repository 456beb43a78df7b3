"""A plan that fits, what it is predicted to take, and what makes it slower than another."""

from __future__ import annotations

from dataclasses import dataclass

from ilm_compile.cost.sizes import StepPlan
from ilm_compile.cost.step_memory import StepMemory
from ilm_compile.cost.step_time import StepTime
from ilm_compile.program.plan import AUTO, SELECTIVE, Plan

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A plan with its prediction.

    limit: bytes that it may need. mfu: model FLOP/s over the peak of the devices.
    """

    plan: StepPlan
    limit: float
    time: StepTime
    memory: StepMemory
    tokens_per_second_per_gpu: float
    mfu: float

    @property
    def name(self) -> str:
        """The plan as the options that differ from one device's."""
        plan = self.plan
        text = f"tp={plan.tp} cp={plan.cp} ep={plan.ep} pp={plan.pp} dp={plan.dp // plan.ep}"
        text += f" zero={plan.zero} micro-batch={plan.micro_batch:g}x{plan.num_microbatches:g}"
        if plan.pp > 1:
            text += f" {plan.schedule}" + (f" x{plan.chunks}" if plan.chunks > 1 else "")
        if plan.recompute != "none":
            text += f" recompute={self.recompute}"
        return text

    @property
    def recompute(self) -> str:
        """What is recomputed: none, selective, auto, or the part of the layers, as "25%"."""
        plan = self.plan
        return plan.recompute if plan.recompute != "full" else f"{plan.recompute_share:.0%}"

    @property
    def figures(self) -> str:
        """What it is predicted to take, in one line."""
        plan, time = self.plan, self.time.total
        rate = self.tokens_per_second_per_gpu * plan.gpus
        return (
            f"{time:.3g} s a step, {rate:,.0f} tokens/s, MFU {self.mfu:.1%}, "
            f"{self.memory.total / 2**30:.2f} GiB on the fullest rank"
        )

    def slower_than(self, best: Candidate) -> str:
        """Return in one line how much slower it is, and what most of that is."""
        ratio = self.time.total / best.time.total
        more = {
            "bubble": self.time.bubble - best.time.bubble,
            "exposed communication": self.time.exposed - best.time.exposed,
            "optimizer": self.time.optimizer - best.time.optimizer,
            "recompute": self.time.again - best.time.again,
            "compute: smaller products, or a longer last stage": self._work - best._work,
        }
        cause, seconds = max(more.items(), key=lambda item: item[1])
        if seconds <= 0:
            return f"{ratio:.2f}x the time"
        return f"{ratio:.2f}x the time, {seconds:.3g} s of it more {cause}"

    @property
    def _work(self) -> float:
        time = self.time
        return time.total - time.bubble - time.exposed - time.optimizer - time.again

    def to_plan(self) -> Plan:
        """Return the plan that `partition` and `parallelize` take.

        There ep is an axis of its own, whose ranks share the rows of a micro-batch.
        """
        plan = self.plan
        checkpoint: bool | float | str = plan.recompute
        if checkpoint not in (AUTO, SELECTIVE):
            share = 0.0 if plan.recompute == "none" else plan.recompute_share
            checkpoint = share if 0 < share < 1 else bool(share)
        tensors = int(self.limit - self.memory.reserved) // 2**20
        return Plan(
            tp=plan.tp,
            cp=plan.cp,
            ep=plan.ep,
            pp=plan.pp,
            dp=plan.dp // plan.ep,
            num_chunks=plan.chunks,
            num_microbatches=int(plan.num_microbatches),
            schedule=plan.schedule,
            sequence_parallel=plan.sequence_parallel,
            checkpoint=checkpoint,
            memory=f"{tensors}MiB" if checkpoint == AUTO else None,
            dtype=DTYPES[plan.precision],
            zero=plan.zero,
        )
