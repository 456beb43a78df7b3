"""Schedules that split the backward train the same model, and run no block more often."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import ilm_compile
from ilm_compile.partitioning import make_schedule
from ilm_compile.passes import lower
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.program.weight_parts import WeightParts
from ilm_compile.proof.emulate import Step, emulate
from ilm_compile.proof.reference import single_device_step
from ilm_compile.schedule import StageTimes, search
from tests.proof.small import verify
from tests.support.equality import (
    EXAMPLE,
    ROWS,
    Case,
    assert_equal,
    compare,
    make_batch,
    make_model,
)
from tests.support.promote import promoted_float32
from tests.support.traced import traced_once

MICRO_BATCHES = 5
CHUNKS = {"zb_h1": 1, "zb_h2": 1, "zb_v": 2}
WHOLE = {1: "1f1b", 2: "gpipe"}  # schedules of as many chunks whose backwards are whole


@cache
def lowered(name: str, stored: torch.dtype = torch.float64, **plan: Any) -> LoweredProgram:
    casts = promoted_float32() if stored == torch.float64 else nullcontext()
    with casts, traced_once((name, stored)):
        model = make_model(name).to(stored)
        given = {"num_microbatches": MICRO_BATCHES, **plan}
        return lower(ilm_compile.partition(model, example_inputs=EXAMPLE, **given))


def step(name: str, schedule: str, stored: torch.dtype = torch.float64, **plan: Any) -> Step:
    """One emulated step. The schedules of one number of chunks run one program."""
    chunks = CHUNKS.get(schedule, 2 if schedule == "gpipe" else 1)
    marked = "zb_v" if chunks == 2 else "zb_h1"
    program = lowered(name, stored, schedule=marked, num_chunks=chunks, **plan)
    other = make_schedule(program.plan.replace(schedule=schedule))
    batch = make_batch(ROWS * MICRO_BATCHES)
    [found] = emulate(program, other, make_model(name).to(stored), [batch], max_norm=None)
    return found


@cache
def reference(name: str) -> Step:
    return single_device_step(make_model(name), make_batch(ROWS * MICRO_BATCHES))


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("schedule", CHUNKS)
def test_equals_the_single_device_model(schedule, checkpoint, tp, pp):
    found = step("internlm2", schedule, pp=pp, tp=tp, checkpoint=checkpoint)
    expected = reference("internlm2")
    errors = compare(found.loss, expected.loss, found.gradients, expected.gradients)
    assert errors.loss <= 1e-10, errors
    assert errors.gradient <= 1e-10, errors


@pytest.mark.parametrize(
    ("schedule", "plan"),
    [
        ("zb_h1", {}),
        ("zb_h2", {"checkpoint": 0.5}),
        ("zb_v", {"checkpoint": 0.5}),
        ("zb_h1", {"checkpoint": 0.5, "dtype": torch.bfloat16}),
        ("zb_v", {"tp": 2, "dtype": torch.bfloat16}),
    ],
)
@pytest.mark.parametrize("name", ["internlm2", "gpt2"])
def test_has_the_bits_of_whole_backwards(name, schedule, plan):
    """In float32; the tied embedding of GPT-2 is added up over its stages."""
    whole = step(name, WHOLE[CHUNKS[schedule]], torch.float32, pp=2, **plan)
    split = step(name, schedule, torch.float32, pp=2, **plan)
    assert split.loss.equal(whole.loss)
    assert split.gradients.keys() == whole.gradients.keys()
    assert not [n for n, g in whole.gradients.items() if not g.equal(split.gradients[n])]


def test_stages_without_a_trained_product_have_nothing_left_to_do():
    model = make_model("internlm2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    found = {}
    for schedule in ("1f1b", "zb_h1"):
        with promoted_float32():
            program = ilm_compile.partition(model, example_inputs=EXAMPLE, pp=2, schedule=schedule)
        batch = make_batch(ROWS * 2)
        [found[schedule]] = emulate(lower(program), make_schedule(program.plan), model, [batch])
    assert found["zb_h1"].gradients
    assert all(g.equal(found["1f1b"].gradients[n]) for n, g in found["zb_h1"].gradients.items())


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("schedule", CHUNKS)
def test_no_block_runs_more_often_than_with_whole_backwards(schedule, checkpoint):
    """Once for each micro-batch, and once more where it is recomputed."""
    program = lowered(
        "internlm2", schedule=schedule, num_chunks=CHUNKS[schedule], pp=2, checkpoint=checkpoint
    )
    runs: Counter[str] = Counter()

    def count(module: torch.nn.Module, _: object) -> None:
        first, *_ = [*(name for name, _ in module.named_parameters()), ""]
        if first.startswith("layers."):  # a stage has layers_0
            runs["_".join(first.split(".")[:2])] += 1

    with register_module_forward_pre_hook(count):
        batch = make_batch(ROWS * MICRO_BATCHES)
        emulate(program, make_schedule(program.plan), make_model("internlm2"), [batch])
    regions = [name for stage in program.stages for name, _ in stage.module.named_children()]
    times = MICRO_BATCHES * (2 if checkpoint else 1)
    assert runs == {name: times * n for name, n in Counter(regions).items() if "layers" in name}


def test_a_schedule_that_was_found_trains_the_same(tmp_path):
    """For stages of which the second takes three times as long."""
    times = [StageTimes(forward=t, backward=t, weight=t) for t in (1.0, 3.0)]
    path = str(tmp_path / "found.csv")
    search(times, pp=2, num_microbatches=MICRO_BATCHES, max_in_flight=2).to_csv(path)
    program = lowered("internlm2", schedule=path, pp=2)
    [found] = emulate(
        program,
        make_schedule(program.plan),
        make_model("internlm2"),
        [make_batch(ROWS * MICRO_BATCHES)],
    )
    expected = reference("internlm2")
    errors = compare(found.loss, expected.loss, found.gradients, expected.gradients)
    assert max(errors.loss, errors.gradient) <= 1e-10, errors


def nothing(parts: WeightParts) -> None:
    """Leave out what a micro-batch has left."""


def twice(parts: WeightParts) -> None:
    again = copy(parts)
    RUN(again)
    RUN(parts)


def without_the_last(parts: WeightParts) -> None:
    RUN(replace(parts, _parts=parts._parts[:-1]))


RUN = WeightParts.run


@pytest.mark.parametrize("fault", [nothing, twice, without_the_last])
def test_a_wrong_weight_part_fails_the_proof(fault, monkeypatch):
    monkeypatch.setattr(WeightParts, "run", fault)
    report = verify("internlm2", pp=2, schedule="zb_h1", num_microbatches=2)
    assert not report.ok
    assert "gradient" in str(report.failures)


REAL = [
    Case("internlm2", {"pp": 2, "schedule": "zb_h1", "num_microbatches": 3}, dp=2),
    Case(
        "gpt2",
        {"pp": 2, "num_chunks": 2, "schedule": "zb_v", "zero": 3, "checkpoint": 0.5},
        dp=2,
    ),
    Case("internlm2", {"pp": 2, "cp": 2, "schedule": "zb_h1", "checkpoint": 0.5}),
    Case("experts", {"pp": 2, "ep": 2, "schedule": "zb_h1", "dispatch": True}),
    Case("internlm2", {"pp": 2, "tp": 2, "num_chunks": 2, "schedule": "zb_v", "checkpoint": 0.5}),
]


@pytest.mark.parametrize("case", REAL, ids=str)
def test_real_processes_equal_the_single_device_model(case, world4):
    assert_equal(world4, case, 1e-10)


def gradients(rank: int, schedule: str, zero: int) -> dict[str, torch.Tensor]:
    """Of a bf16 plan on two data-parallel ranks, on rank 0."""
    parallel = ilm_compile.parallelize(
        make_model("internlm2").float(),
        example_inputs=EXAMPLE,
        pp=2,
        num_microbatches=3,
        dtype=torch.bfloat16,
        schedule=schedule,
        zero=zero,
        checkpoint=0.5,
    )
    parallel.execute_schedule(make_batch(ROWS * 3 * 2))
    return parallel.full_gradients()


@pytest.mark.parametrize("zero", [1, 3])
def test_data_parallel_ranks_have_the_bits_of_whole_backwards(zero, world4):
    whole, split = (world4.run(gradients, name, zero)[0] for name in ("1f1b", "zb_h1"))
    assert whole.keys() == split.keys()
    assert not [name for name, grad in whole.items() if not grad.equal(split[name])]
