"""Schedules that split the backward train the same model, and run no block more often."""

from __future__ import annotations

from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import ilm_compile
from ilm_compile.partitioning import make_schedule
from ilm_compile.passes import lower
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.program.weight_parts import WeightParts
from ilm_compile.proof.emulate import Step, emulate
from ilm_compile.proof.reference import single_device_step
from ilm_compile.runtime import LossScaler
from ilm_compile.schedule import StageTimes, search
from tests.proof.small import verify
from tests.support.equality import (
    EXAMPLE,
    ROWS,
    Case,
    assert_prepared_equal,
    compare,
    make_batch,
    make_model,
)
from tests.support.promote import promoted_float32
from tests.support.schedules import CHECKPOINTS, SPLIT, block_runs, planned_runs, recompute
from tests.support.traced import traced_once

MICRO_BATCHES = 5
WHOLE = {1: "1f1b", 2: "gpipe"}  # schedules of as many chunks whose backwards are whole
MESHES = ({"pp": 2}, {"pp": 4}, {"pp": 2, "tp": 2}, {"pp": 4, "tp": 2})
# Every schedule beside every way to recompute, and the meshes in turn. All of them, and more of
# what is looked at: python -m benchmarks.schedule_equality
EQUAL = [
    (schedule, checkpoint, MESHES[(i + j) % len(MESHES)])
    for i, schedule in enumerate(SPLIT)
    for j, checkpoint in enumerate(CHECKPOINTS)
]


@cache
def lowered(name: str, stored: torch.dtype = torch.float64, **plan: Any) -> LoweredProgram:
    casts = promoted_float32() if stored == torch.float64 else nullcontext()
    with casts, traced_once((name, stored)):
        model = make_model(name).to(stored)
        given = {"num_microbatches": MICRO_BATCHES, **plan}
        return lower(ilm_compile.partition(model, example_inputs=EXAMPLE, **given))


def step(name: str, schedule: str, stored: torch.dtype = torch.float64, **plan: Any) -> Step:
    """One emulated step. The schedules of one number of chunks run one program."""
    chunks = SPLIT.get(schedule, 2 if schedule == "gpipe" else 1)
    marked = "zb_v" if chunks == 2 else "zb_h1"
    program = lowered(name, stored, schedule=marked, num_chunks=chunks, **plan)
    other = make_schedule(program.plan.replace(schedule=schedule))
    batch = make_batch(ROWS * MICRO_BATCHES)
    [found] = emulate(program, other, make_model(name).to(stored), [batch], max_norm=None)
    return found


@cache
def reference(name: str) -> Step:
    return single_device_step(make_model(name), make_batch(ROWS * MICRO_BATCHES))


@pytest.mark.parametrize(("schedule", "checkpoint", "mesh"), EQUAL)
def test_equals_the_single_device_model_and_runs_no_block_more_often(schedule, checkpoint, mesh):
    plan = {"schedule": schedule, "num_chunks": SPLIT[schedule], **mesh}
    with promoted_float32(), traced_once(("internlm2", torch.float64)):
        options = {"example_inputs": EXAMPLE, "num_microbatches": MICRO_BATCHES, **plan}
        plan |= recompute(checkpoint, make_model("internlm2"), **options)
    program = lowered("internlm2", **plan)
    batch = make_batch(ROWS * MICRO_BATCHES)
    with block_runs() as runs:
        model = make_model("internlm2")
        [found] = emulate(program, make_schedule(program.plan), model, [batch], max_norm=None)
    expected = reference("internlm2")
    errors = compare(found.loss, expected.loss, found.gradients, expected.gradients)
    assert errors.loss <= 1e-10, errors
    assert errors.gradient <= 1e-10, errors
    once = planned_runs(program.stages, MICRO_BATCHES)
    assert runs == {name: n * mesh.get("tp", 1) for name, n in once.items()}


@pytest.mark.parametrize(
    ("schedule", "plan"),
    [
        ("zb_h1", {}),
        ("zb_h2", {"checkpoint": 0.5}),
        ("zb_v", {"checkpoint": 0.5}),
        ("zb_h1", {"checkpoint": 0.5, "dtype": torch.bfloat16}),
        ("zb_v", {"tp": 2, "dtype": torch.bfloat16}),
        ("dualpipe_v", {}),
        ("v_half", {"checkpoint": 0.5}),
        ("v_min", {}),
    ],
)
@pytest.mark.parametrize("name", ["internlm2", "gpt2"])
def test_has_the_bits_of_whole_backwards(name, schedule, plan):
    """In float32; the tied embedding of GPT-2 is added up over its stages."""
    whole = step(name, WHOLE[SPLIT[schedule]], torch.float32, pp=2, **plan)
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


IN_V = {"num_chunks": 2, "pp": 2}
REAL = [
    Case("internlm2", {"pp": 2, "schedule": "zb_h1", "num_microbatches": 3}, dp=2),
    Case("gpt2", {**IN_V, "schedule": "zb_v", "zero": 3, "checkpoint": 0.5}, dp=2),
    Case("internlm2", {"pp": 2, "cp": 2, "schedule": "zb_h2", "checkpoint": 0.5}),
    Case("experts", {**IN_V, "ep": 2, "schedule": "v_half", "dispatch": True}),
    Case("internlm2", {**IN_V, "tp": 2, "schedule": "dualpipe_v", "checkpoint": 0.5}),
    Case("internlm2", {**IN_V, "pp": 4, "schedule": "v_min", "num_microbatches": 5}),
]


@pytest.mark.parametrize("case", REAL, ids=str)
def test_real_processes_equal_the_single_device_model(case, prepared):
    assert_prepared_equal(prepared, 4, case, 1e-10)


def trained(rank: int, schedule: str, zero: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and, on rank 0, the weights of GPT-2 with dropout after some float16 steps."""
    with traced_once("float16"):
        parallel = ilm_compile.parallelize(
            make_model("dropout").float(),
            example_inputs=EXAMPLE,
            pp=2,
            num_chunks=SPLIT.get(schedule, 1),
            num_microbatches=3,
            dtype=torch.float16,
            schedule=schedule,
            checkpoint=0.5,
            zero=zero,
        )
    scaler = LossScaler(initial_scale=2.0**22, hysteresis=1)
    trainer = ilm_compile.Trainer(parallel, lr=1e-3, scaler=scaler)
    batch = make_batch(ROWS * 3 * parallel.mesh.dp.size)
    history = trainer.fit([batch] * 5, 5, progress=False)
    assert 0 < trainer.num_skipped_steps < 5
    return [metrics.loss for metrics in history], parallel.full_state_dict()


@pytest.fixture(scope="module")
def whole_steps(world4):
    return world4.run(trained, "1f1b", 1)[0]


@pytest.mark.parametrize(("schedule", "zero"), [("zb_h1", 1), ("zb_h1", 3), ("zb_v", 1)])
def test_steps_have_the_bits_of_whole_backwards(schedule, zero, world4, whole_steps):
    """With dropout, a loss scale that overflows, recompute, and data-parallel ranks."""
    losses, weights = world4.run(trained, schedule, zero)[0]
    assert losses == whole_steps[0]
    assert not [name for name, weight in whole_steps[1].items() if not weight.equal(weights[name])]
