"""What a step sends, counted in real processes, equals what the program predicts, to the byte."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

import ilm_compile
from ilm_compile.program.program import Program
from ilm_compile.program.step_traffic import collectives, predicted_traffic
from tests.support.equality import MODELS, SEQ, make_batch
from tests.support.traced import traced_once
from tests.support.world import World

EXAMPLE = {name: ((2, SEQ), torch.int64) for name in ("input_ids", "labels")}
PLANS = {
    2: [
        {"tp": 2},
        {"tp": 2, "sequence_parallel": True, "num_microbatches": 3},
        {"tp": 2, "sequence_parallel": False},
        {"tp": 2, "checkpoint": True, "num_microbatches": 2},
        {"tp": 2, "checkpoint": 0.5, "sequence_parallel": True},
        {"tp": 2, "sequence_parallel": True, "async_tensor_parallel": True, "checkpoint": 0.5},
        {"tp": 2, "embed_split_hidden": True, "checkpoint": True},
        {"tp": 2, "dtype": torch.bfloat16},
        {"pp": 2, "num_microbatches": 4},
        {"cp": 2, "cp_attention": "ring", "checkpoint": 0.5},
    ],
    4: [
        {"tp": 2, "pp": 2, "num_microbatches": 3},
        {"tp": 2, "pp": 2, "sequence_parallel": True, "checkpoint": True},
        {"tp": 2, "pp": 2, "num_chunks": 2, "num_microbatches": 4, "checkpoint": 0.5},
        {"tp": 2, "pp": 2, "num_chunks": 2, "schedule": "zb_v", "checkpoint": 0.5},
        {"tp": 4, "sequence_parallel": True},
        {"tp": 4, "sequence_parallel": True, "async_tensor_parallel": True},
    ],
}


def gpt2_with_dropout() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": SEQ}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


def make_model(name: str, frozen: tuple[str, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    model = (MODELS | {"gpt2-dropout": gpt2_with_dropout})[name]()
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(not any(word in path for word in frozen))
    return model


def predict(
    name: str, plan: dict[str, Any], frozen: tuple[str, ...] = ()
) -> tuple[Program, list[dict[str, Any]]]:
    with traced_once((name, frozen)):
        program = ilm_compile.partition(make_model(name, frozen), example_inputs=EXAMPLE, **plan)
    steps = predicted_traffic(program)
    return program, [{kind: asdict(sent) for kind, sent in step.items()} for step in steps]


def count(
    rank: int, name: str, plan: dict[str, Any], frozen: tuple[str, ...] = (), num_steps: int = 1
) -> tuple[int, dict[str, Any]]:
    """This rank's place in the pipeline, and what it sent in `num_steps` steps."""
    model = make_model(name, frozen)
    with traced_once((name, frozen)):
        parallel = ilm_compile.parallelize(model, example_inputs=EXAMPLE, **plan)
    batch = make_batch(2 * parallel.plan.num_microbatches)
    for _ in range(num_steps):
        parallel.execute_schedule(batch)
    sent = {kind: asdict(traffic) for kind, traffic in parallel.traffic().items()}
    return parallel.mesh.pp.rank, sent


def label(plan: object) -> str:
    return "-".join(f"{k}{v}" for k, v in plan.items()) if isinstance(plan, dict) else str(plan)


def check(name: str, plan: dict[str, Any], world: World, frozen: tuple[str, ...] = ()) -> None:
    _, predicted = predict(name, plan, frozen)
    for pp_rank, sent in world.run(count, name, plan, frozen):
        assert sent == predicted[pp_rank]


@pytest.mark.parametrize("plan", PLANS[2], ids=label)
@pytest.mark.parametrize("name", ["internlm2", "llama"])
def test_two_processes_send_what_was_predicted(name, plan, world2):
    check(name, plan, world2)


@pytest.mark.parametrize("plan", PLANS[4], ids=label)
@pytest.mark.parametrize("name", ["internlm2", "llama"])
def test_four_processes_send_what_was_predicted(name, plan, world4):
    check(name, plan, world4)


@pytest.mark.parametrize(
    "frozen",
    [("norm",), ("embed",), ("embed", "layers.0.", "layers.1.")],
    ids=["norms", "embedding", "lower-half"],
)
def test_no_gradient_is_predicted_for_frozen_parts(frozen, world2):
    plan = {"tp": 2, "sequence_parallel": True, "checkpoint": True}
    _, whole = predict("llama", plan)
    _, rest = predict("llama", plan, frozen)
    assert sum(k["calls"] for k in rest[0].values()) < sum(k["calls"] for k in whole[0].values())
    check("llama", plan, world2, frozen)
    check("llama", {**plan, "async_tensor_parallel": True}, world2, frozen)


def test_a_dropout_at_the_end_of_a_block_makes_its_last_reduction_run_again(world2):
    """The mask is kept for backward, so the recomputed block must get as far as the dropout."""
    plan = {"tp": 2, "checkpoint": True}
    _, (step,) = predict("gpt2-dropout", plan)
    _, (without,) = predict("gpt2", plan)
    per_block = [without["all_reduce"]["calls"] / 4, step["all_reduce"]["calls"] / 2]
    assert per_block[1] > per_block[0]
    check("gpt2-dropout", plan, world2)


def test_every_step_adds_the_same(world2):
    plan = {"tp": 2, "num_microbatches": 2}
    once, thrice = (world2.run(count, "llama", plan, (), steps)[0][1] for steps in (1, 3))
    tripled = {k: {field: 3 * value for field, value in v.items()} for k, v in once.items()}
    assert thrice == tripled


@pytest.mark.parametrize("plan", [PLANS[2][3], PLANS[4][2]], ids=label)
def test_explain_prints_the_totals(plan):
    program, steps = predict("llama", plan)
    text = program.explain()
    assert "bytes that each rank sends per step" in text
    for kind, sent in [pair for step in steps for pair in step.items()]:
        assert kind in text
        if sent["num_bytes"]:
            assert f"{sent['num_bytes']:,} B" in text


def test_the_blocks_of_explain_add_up_to_its_totals():
    plan = {"tp": 2, "checkpoint": 0.5, "sequence_parallel": True}
    program, (step,) = predict("llama", plan)
    messages = [m for found in collectives(program).values() for m in found]
    total = sum(sent["num_bytes"] for kind, sent in step.items() if kind != "p2p")
    assert sum(m.num_bytes for m in messages) == total
