"""Dropout drops the same elements under every plan."""

from __future__ import annotations

import pytest
import torch

import ilm_compile
from ilm_compile.partitioning import make_schedule
from ilm_compile.passes import lower
from ilm_compile.proof.emulate import emulate
from ilm_compile.proof.promote import promoted_float32
from tests.support.batches import random_batch

INPUTS = {name: ((2, 16), torch.int64) for name in ("input_ids", "labels")}


def gpt2():
    """GPT-2 as it is configured by default: dropout of embeddings, attention and residuals."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 8, "vocab_size": 512, "n_positions": 64}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).double()


def step(plan, dp=1):
    with promoted_float32():
        model = gpt2()
        program = ilm_compile.partition(model, example_inputs=INPUTS, **plan)
        batch = random_batch(program.inputs, 4, 512)
        schedule = make_schedule(program.plan)
        return emulate(lower(program), schedule, model, [batch], dp=dp)[0], program


@pytest.fixture(scope="module")
def alone():
    return step({"num_microbatches": 4})[0]


@pytest.mark.parametrize(
    ("plan", "dp"),
    [
        ({"tp": 2, "num_microbatches": 4}, 1),
        ({"tp": 4, "num_microbatches": 4, "sequence_parallel": True, "checkpoint": True}, 1),
        ({"pp": 2, "num_microbatches": 2, "checkpoint": 0.5}, 2),
        ({"tp": 2, "num_microbatches": 4, "checkpoint": "selective"}, 1),
        ({"tp": 2, "pp": 2, "num_chunks": 2, "num_microbatches": 4}, 1),
        (
            {
                "pp": 2,
                "num_chunks": 2,
                "num_microbatches": 4,
                "schedule": "zb_v",
                "checkpoint": 0.5,
            },
            1,
        ),
        ({"cp": 4, "num_microbatches": 4}, 1),
        ({"cp": 2, "tp": 2, "num_microbatches": 2}, 2),
    ],
    ids=str,
)
def test_every_plan_drops_the_same_elements(alone, plan, dp):
    other, program = step(plan, dp)
    assert not program.warnings
    torch.testing.assert_close(other.loss, alone.loss, rtol=1e-10, atol=0)
    floor = 1e-5 * torch.stack([g.norm() for g in alone.gradients.values()]).norm()
    for name, gradient in alone.gradients.items():
        error = (other.gradients[name] - gradient).norm() / torch.maximum(gradient.norm(), floor)
        assert error <= 1e-10, name


def test_evaluation_drops_nothing():
    parallel = ilm_compile.parallelize(gpt2(), example_inputs=INPUTS)
    batch = random_batch({n: parallel.inputs[n] for n in INPUTS}, 1, 512)
    parallel.eval()
    losses = [float(parallel.execute_schedule(batch, forward_only=True)) for _ in range(2)]
    expected = float(gpt2().eval()(**batch, use_cache=False).loss)
    assert losses == pytest.approx([expected, expected], rel=1e-6)


def test_each_training_step_drops_other_elements():
    parallel = ilm_compile.parallelize(gpt2(), example_inputs=INPUTS)
    batch = random_batch({n: parallel.inputs[n] for n in INPUTS}, 1, 512)
    first, second = (float(parallel.execute_schedule(batch)) for _ in range(2))
    assert first != second
