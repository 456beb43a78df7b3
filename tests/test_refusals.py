"""Bad input gets a clear error before any work starts: what, expected, got, what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ilm_compile
from ilm_compile import BatchError, PlanError, ScheduleError, TraceError, models


class Branching(nn.Module):
    """Returns another loss when the data says so, which no static graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x, labels):
        logits = self.head(x)
        if logits.sum() > 0:
            logits = -logits
        return nn.functional.cross_entropy(logits, labels)


class Counting(nn.Module):
    """Keeps count of its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, labels):
        self.calls.add_(1)
        return nn.functional.cross_entropy(self.head(x), labels)


class Headless(nn.Module):
    """Returns features and no loss."""

    def forward(self, x, labels):
        return x


INPUTS = {"x": ((2, 4), torch.float32), "labels": ((2,), torch.int64)}


@pytest.mark.parametrize(
    ("make", "keywords", "error", "message"),
    [
        (
            models.internlm2_tiny,
            {"tp": 3},
            PlanError,
            r"tp=3 does not divide the 8 attention heads of node attention \(layers.0.attention.*"
            r"use one of tp=\[1, 2, 4, 8\]",
        ),
        (
            models.internlm2_tiny,
            {"tp": 2, "hardware": "abacus"},
            PlanError,
            "unknown hardware 'abacus'; known are .*h100",
        ),
        (models.internlm2_tiny, {"pp": 32}, PlanError, r"32 stages.*cut points"),
        (
            models.internlm2_tiny,
            {"pp": 4, "num_chunks": 2, "num_microbatches": 9},
            ScheduleError,
            r"num_microbatches=9.*8",
        ),
        (
            models.internlm2_tiny,
            {"pp": 2, "num_chunks": 2, "schedule": "1f1b"},
            ScheduleError,
            "interleaved_1f1b",
        ),
        (models.internlm2_tiny, {"schedule": "2f2b"}, ScheduleError, r"2f2b.*1f1b"),
        (models.internlm2_tiny, {"tp": 0}, PlanError, "tp must be a positive integer, got 0"),
        (models.internlm2_tiny, {"num_chunks": 2}, PlanError, "num_chunks=2 needs pp > 1"),
        (models.internlm2_tiny, {"checkpoint": 1.5}, PlanError, r"or \"auto\", got 1.5"),
        (
            models.internlm2_tiny,
            {"dtype": torch.float64},
            PlanError,
            "dtype must be None, torch.bfloat16 or torch.float16",
        ),
        (models.internlm2_tiny, {"zero": 2}, PlanError, "zero must be 1 or 3, got 2"),
        (models.internlm2_tiny, {"tensor": 2}, PlanError, r"unknown option \['tensor'\]"),
        (
            Branching,
            {"example_inputs": INPUTS},
            TraceError,
            r"(?s)Branching cannot be captured .*test_refusals.py:\d+: if logits.sum\(\) > 0",
        ),
        (Counting, {"example_inputs": INPUTS}, TraceError, r"writes to the buffers \['calls'\]"),
        (
            Headless,
            {"example_inputs": INPUTS},
            TraceError,
            "expected the model to return a scalar loss",
        ),
        (Headless, {}, TraceError, r"Headless has no example_inputs\(\); pass example_inputs="),
        (
            Headless,
            {"example_inputs": {"x": ((2, 4), torch.float32), "labels": ((3,), torch.int64)}},
            TraceError,
            "dimension 0 of every example input must be the micro-batch size",
        ),
    ],
)
def test_partition_refuses(make, keywords, error, message):
    with pytest.raises(error, match=message):
        ilm_compile.partition(make(), **keywords)


def test_parallelize_outside_torchrun_says_how_to_start():
    with pytest.raises(PlanError, match="torchrun --nproc-per-node=4"):
        ilm_compile.parallelize(models.internlm2_tiny(), tp=2, pp=2)


@pytest.fixture(scope="module")
def alone():
    inputs = {name: ((2, 64), torch.int64) for name in ("input_ids", "labels")}
    return ilm_compile.parallelize(
        models.internlm2_tiny(), example_inputs=inputs, num_microbatches=3
    )


def batch(rows=6, seq=64, dtype=torch.int64, names=("input_ids", "labels")):
    return {name: torch.zeros(rows, seq, dtype=dtype) for name in names}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (batch(rows=5), r"6"),
        (batch(seq=32), r"64"),
        (batch(dtype=torch.float32), r"int64"),
        (batch(names=("input_ids",)), r"labels"),
        (batch(names=("input_ids", "labels", "mask")), r"mask"),
    ],
    ids=["rows not divided by the micro-batches", "sequence", "dtype", "missing", "unknown"],
)
def test_a_batch_that_does_not_fit_is_refused(alone, given, message):
    with pytest.raises(BatchError, match=message):
        alone.execute_schedule(given)


def refusal(rank, keywords):
    try:
        ilm_compile.parallelize(models.internlm2_tiny(), **keywords)
    except PlanError as error:
        return str(error)
    return ""


def test_a_world_that_does_not_fit_the_plan_is_refused(world2):
    for message in world2.run(refusal, {"tp": 4}):
        assert "tp*pp" in message.replace(" ", "")
        assert "2" in message
        assert "torchrun" in message
