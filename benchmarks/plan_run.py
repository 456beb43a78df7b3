"""One rank of a run under one plan, and the same training in plain PyTorch to compare with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import ilm_compile
from benchmarks.common import make_model, random_batch
from benchmarks.observe import Observer
from ilm_compile.partitioning import make_plan
from ilm_compile.program.plan import Plan
from ilm_compile.runtime import adamw

LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 2
TIMELINE_STEPS = 3

Timeline = list[tuple[str, float, float]]  # (action, start, end), in seconds of one clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all plans train: a model and a global batch of `rows` sequences of `seq_len` tokens."""

    preset: str = "internlm2_tiny"
    overrides: dict[str, Any] = field(default_factory=dict)
    rows: int = 16
    seq_len: int = 64
    steps: int = 5

    def batches(self, count: int, vocab_size: int) -> list[dict[str, Tensor]]:
        """The first `count` global batches, the same for every plan."""
        return [
            random_batch(self.rows, self.seq_len, vocab_size, seed=step) for step in range(count)
        ]


@dataclass(frozen=True, slots=True)
class Row:
    """A plan to run. fields: those of `ilm_compile.Plan`, and dp."""

    name: str
    fields: dict[str, Any]

    @property
    def plan(self) -> Plan:
        return make_plan(**self.fields)

    @property
    def dp(self) -> int:
        return int(self.fields.get("dp", 1))

    @property
    def num_processes(self) -> int:
        return self.plan.ranks_per_replica * self.dp

    @property
    def num_slices(self) -> int:
        """Micro-batches of the global batch."""
        return self.plan.num_microbatches * self.dp


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRun:
    """What one rank measured.

    step_times_s, losses: of the steps after the warm-up, of all steps. sent_bytes: of one step, by
    kind of collective. peak_bytes: most bytes of live tensors in a step. timelines: of some steps.
    """

    step_times_s: list[float]
    losses: list[float]
    sent_bytes: dict[str, int]
    peak_bytes: int
    timelines: list[Timeline]


def run_plan(settings: Settings, row: Row) -> RankRun:
    """Train under a plan on this rank: first timed, then with the timeline on, then observed."""
    model = make_model(settings.preset, settings.overrides)
    example = model.example_inputs(settings.rows // row.num_slices, settings.seq_len)
    parallel = ilm_compile.parallelize(model, example_inputs=example, plan=row.plan)
    trainer = ilm_compile.Trainer(parallel, lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
    num_steps = WARMUP_STEPS + settings.steps
    batches = settings.batches(num_steps + 1, model.config.vocab_size)
    history = trainer.fit(batches, num_steps, progress=False)
    parallel.executor.record_timeline = True
    timelines: list[Timeline] = []
    for _ in range(TIMELINE_STEPS):
        trainer.fit(batches[-1:], 1, progress=False)
        timelines.append(parallel.executor.timeline)
    parallel.executor.record_timeline = False
    with Observer() as observer:
        trainer.fit(batches[-1:], 1, progress=False)
    return RankRun(
        step_times_s=[metrics.step_time_s for metrics in history[WARMUP_STEPS:]],
        losses=[metrics.loss for metrics in history],
        sent_bytes={kind: traffic.num_bytes for kind, traffic in observer.sent.items()},
        peak_bytes=observer.peak_bytes,
        timelines=timelines,
    )


def run_plain(settings: Settings, num_microbatches: int) -> RankRun:
    """The same training without ilm_compile: the model, its loss, backward and AdamW."""
    model = make_model(settings.preset, settings.overrides, device="cpu")
    optimizer = adamw(model.named_parameters(), lr=LEARNING_RATE)
    num_steps = WARMUP_STEPS + settings.steps
    batches = settings.batches(num_steps + 1, model.config.vocab_size)

    def step(batch: dict[str, Tensor]) -> float:
        optimizer.zero_grad()
        total = torch.zeros(())
        columns = [batch[name].chunk(num_microbatches) for name in ("input_ids", "labels")]
        for input_ids, labels in zip(*columns, strict=True):
            loss = model(input_ids, labels=labels) / num_microbatches
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        return total.item()

    times, losses = [], []
    for batch in batches[:num_steps]:
        start = time.perf_counter()
        losses.append(step(batch))
        times.append(time.perf_counter() - start)
    with Observer() as observer:
        step(batches[-1])
    return RankRun(
        step_times_s=times[WARMUP_STEPS:],
        losses=losses,
        sent_bytes={},
        peak_bytes=observer.peak_bytes,
        timelines=[],
    )
