"""One rank of a contest: a pipeline run by our executor, and by torch.distributed.pipelining's.

Both run the very same stage modules, those that `lower` cut and `Parallel` gave their weights, on
the same micro-batches in the same processes. So whatever differs is the cost of running them.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from torch.nn import functional

from benchmarks.common import random_batch
from ilm_compile.errors import IlmCompileError
from ilm_compile.models import internlm2_tiny
from ilm_compile.partitioning import make_plan, make_schedule, partition
from ilm_compile.passes import lower
from ilm_compile.program.lowered import Boundary, LoweredProgram, Stage
from ilm_compile.runtime import Mesh, Parallel
from ilm_compile.schedule import Action
from ilm_compile.schedule.simulate import Span

# Our name of a schedule -> torch's class, and the stages it puts on a rank. Where torch has no such
# schedule it is the one that splits the backwards of the same stages.
SCHEDULES: dict[str, tuple[Any, int]] = {
    "1f1b": (pipelining.Schedule1F1B, 1),
    "interleaved_1f1b": (pipelining.ScheduleInterleaved1F1B, 2),
    "zb_h1": (pipelining.ScheduleInterleavedZeroBubble, 1),
    "zb_h2": (pipelining.ScheduleInterleavedZeroBubble, 1),
    "zb_v": (pipelining.ScheduleZBVZeroBubble, 2),
    "dualpipe_v": (pipelining.ScheduleDualPipeV, 2),
    "v_half": (pipelining.ScheduleZBVZeroBubble, 2),
    "v_min": (pipelining.ScheduleZBVZeroBubble, 2),
}


VOCAB_SIZE = 512


class SmallestModel(nn.Module):
    """Eight blocks that compute next to nothing, so that what a step costs is what runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
        self.head = nn.Linear(16, VOCAB_SIZE)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def transformer() -> nn.Module:
    """8 blocks of hidden size 512."""
    return internlm2_tiny(num_layers=8, hidden_size=512, vocab_size=VOCAB_SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model and a batch of `num_microbatches` times `rows` sequences."""

    make_model: Callable[[], nn.Module]
    rows: int
    seq_len: int
    num_microbatches: int = 8


class Contest:
    """The contestants, ready to run steps: `ours`, `ours_whole`, `theirs` and `loop`."""

    def __init__(self, workload: Workload, schedule: str) -> None:
        pp = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
        _, num_chunks = SCHEDULES[schedule]
        plan = make_plan(
            pp=pp,
            num_chunks=num_chunks,
            num_microbatches=workload.num_microbatches,
            schedule=schedule,
        )
        torch.manual_seed(0)
        model = workload.make_model()
        shape = (workload.rows, workload.seq_len)
        example = {name: (shape, torch.int64) for name in ("input_ids", "labels")}
        program = partition(model, plan=plan, example_inputs=example)
        lowered = lower(program)
        mesh = Mesh.create(plan)
        self.num_microbatches = workload.num_microbatches
        self.parallel = Parallel(
            lowered, make_schedule(plan), mesh, model, initializer=program.initializer
        )
        self.stages = self.parallel.stages
        self.batch = random_batch(
            workload.rows * workload.num_microbatches, workload.seq_len, VOCAB_SIZE
        )
        self.inputs = self._microbatches(lowered)
        self._torch_schedule = self._make_torch_schedule(schedule, lowered)
        self._received = {s.index: _random(s.received) for s in self.stages}
        self._grads = {s.index: _random(s.sent) or [torch.tensor(1.0)] for s in self.stages}

    def _microbatches(self, lowered: LoweredProgram) -> dict[str, list[Tensor]]:
        """Each batch input of this rank's stages, and the target counts, by micro-batch."""
        count = self.num_microbatches
        columns = {name: list(value.chunk(count)) for name, value in self.batch.items()}
        targets = torch.tensor(float(self.batch["labels"].numel() / count))
        columns |= {name: [targets] * count for name in lowered.target_counts}
        used = {name for stage in self.stages for name in stage.batch_inputs}
        return {name: column for name, column in columns.items() if name in used}

    def ours(self) -> None:
        """One step of our executor: what runs this rank's actions, and nothing else."""
        self.parallel.executor.run(self.inputs, loss_gradient=1 / self.num_microbatches)

    def ours_whole(self) -> None:
        """The same through `execute_schedule`: batch checks, the loss on every rank, DTensors."""
        self.parallel.execute_schedule(self.batch)

    def theirs(self) -> None:
        """One step of torch's schedule."""
        args, kwargs = self._torch_inputs
        self._torch_schedule.step(*args, **kwargs, return_outputs=False)

    def timeline(self) -> dict[Action, Span]:
        """When each compute of one step of ours runs on this rank, in seconds."""
        executor, row = self.parallel.executor, self.parallel.schedule.actions
        executor.record_timeline = True
        self.ours()
        executor.record_timeline = False
        spans = {name: Span(start, stop) for name, start, stop in executor.timeline}
        return {a: spans[str(a)] for a in row[self.parallel.mesh.pp.rank] if a.is_compute}

    def loop(self) -> None:
        """The stage computations of a step and nothing more: fixed tensors in, nothing sent."""
        for m in range(self.num_microbatches):
            for stage in self.stages:
                received = self._received[stage.index]
                leaves = [
                    tensor.detach().requires_grad_(boundary.requires_grad)
                    for tensor, boundary in zip(received, stage.received, strict=True)
                ]
                batch = [self.inputs[name][m] for name in stage.batch_inputs]
                outputs = stage.module(*batch, *leaves)
                grads = self._grads[stage.index]
                pairs = zip(outputs, grads, strict=False)
                roots = [(output, grad) for output, grad in pairs if output.requires_grad]
                torch.autograd.backward([o for o, _ in roots], [grad for _, grad in roots])

    def zero_grad(self) -> None:
        """Forget all gradients, those of the stage modules and the public ones."""
        self.parallel.zero_grad()
        for stage in self.stages:
            stage.module.zero_grad()

    def gradients(self) -> list[Tensor]:
        """The gradients that the last step left on the stage modules, in a fixed order."""
        return [
            parameter.grad.clone()
            for stage in self.stages
            for parameter in stage.module.parameters()
            if parameter.grad is not None
        ]

    def check_equal(self) -> None:
        """Raise unless both left the same gradients: they would not have done the same work."""
        found = []
        for step in (self.ours, self.theirs):
            self.zero_grad()
            step()
            found.append(self.gradients())
        ours, theirs = found
        if len(ours) != len(theirs) or not all(map(torch.allclose, ours, theirs)):
            raise IlmCompileError(
                "contest: expected the same gradients from both executors, got different ones"
            )

    def _make_torch_schedule(self, name: str, lowered: LoweredProgram) -> Any:
        stages = []
        for stage in self.stages:
            first, last = stage.index == 0, not stage.sent
            columns = (self.inputs[name][0] for name in stage.batch_inputs)
            inputs = list(columns) if first else [_meta(b) for b in stage.received]
            outputs = (
                [torch.empty((), device="meta", requires_grad=True)]
                if last
                else [_meta(b) for b in stage.sent]
            )
            stages.append(
                pipelining.PipelineStage(
                    _TorchStage(stage, self.inputs),
                    stage.index,
                    len(lowered.stages),
                    self.parallel.mesh.device,
                    input_args=tuple(inputs),
                    output_args=tuple(outputs),
                    group=self.parallel.mesh.pp.group,
                )
            )
        make, _ = SCHEDULES[name]
        self._torch_inputs = self._inputs_for_torch()
        return make(
            stages if issubclass(make, PipelineScheduleMulti) else stages[0],
            self.num_microbatches,
            loss_fn=lambda loss, _: loss / self.num_microbatches,
            scale_grads=False,
        )

    def _inputs_for_torch(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Arguments of `step`: those of the first stage by position, of the others by name."""
        first = [stage for stage in self.stages if stage.index == 0]
        args = [self.batch[name] for stage in first for name in stage.batch_inputs]
        later = {n for s in self.stages if s.index > 0 for n in s.batch_inputs if n in self.batch}
        kwargs = {name: self.batch[name] for name in later}
        is_last = any(not stage.sent for stage in self.stages)
        return args, kwargs | ({"target": self.batch["labels"]} if is_last else {})


class _TorchStage(nn.Module):
    """A lowered stage as `PipelineStage` calls one: its batch inputs by name, one loss at the end.

    Costs about a microsecond per call. What is no tensor of rows (the number of targets) is the
    same for every micro-batch and kept here.
    """

    def __init__(self, stage: Stage, inputs: Mapping[str, Sequence[Tensor]]) -> None:
        super().__init__()
        self.stage = stage
        self.module = stage.module
        self.constants = {n: inputs[n][0] for n in stage.batch_inputs if not inputs[n][0].shape}

    def forward(self, *args: Tensor, **batch: Tensor) -> Any:
        if self.stage.index == 0:
            return _owned(self.module(*args))
        named = [
            batch[name] if name in batch else self.constants[name]
            for name in self.stage.batch_inputs
        ]
        outputs = self.module(*named, *args)
        return _owned(outputs) if self.stage.sent else outputs[0]


def _owned(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Without views: torch's split backwards detach outputs in place, which views do not allow."""
    return tuple(output.clone() if output._is_view() else output for output in outputs)


@dataclass(frozen=True, slots=True)
class Time:
    """One step on this rank, in seconds. cpu: of all threads of the process, waiting is free."""

    wall: float
    cpu: float


def measure(
    contest: Contest, names: Sequence[str], repeats: int, *, warmup: int = 2
) -> dict[str, list[Time]]:
    """Run the named contestants in turn, `repeats` times each, and return their times.

    Each round begins with another contestant, and each step with all ranks at a barrier. Garbage is
    collected between the measured parts.
    """
    times: dict[str, list[Time]] = {name: [] for name in names}
    gc.disable()
    try:
        for turn in range(warmup + repeats):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                contest.zero_grad()
                gc.collect()
                dist.barrier()
                wall, cpu = time.perf_counter(), time.process_time()
                getattr(contest, name)()
                times[name].append(Time(time.perf_counter() - wall, time.process_time() - cpu))
    finally:
        gc.enable()
    return {name: values[warmup:] for name, values in times.items()}


def _random(boundaries: Sequence[Boundary]) -> list[Tensor]:
    return [torch.randn(b.shape).to(b.dtype) for b in boundaries]


def _meta(boundary: Boundary) -> Tensor:
    value = torch.empty(boundary.shape, dtype=boundary.dtype, device="meta")
    return value.requires_grad_(boundary.requires_grad)
