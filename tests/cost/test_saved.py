"""What a program says autograd keeps for backward is what autograd keeps, to the byte."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import ilm_compile
from ilm_compile.cost import saved_bytes
from ilm_compile.passes import FuseKernels, FuseResidual
from ilm_compile.program.program import Program
from ilm_compile.runtime.observe.saved import SavedBytes
from tests.support.equality import EXAMPLE, MODELS, ROWS, make_batch, make_model
from tests.support.world import World

BF16 = {"dtype": torch.bfloat16}
FUSED = {"passes": [FuseKernels(), FuseResidual()]}
SELECTIVE = {"checkpoint": "selective"}
CASES: list[tuple[str, dict[str, Any]]] = [
    *[("internlm2", plan) for plan in ({}, BF16, FUSED, BF16 | FUSED, {"checkpoint": 0.5})],
    ("internlm", BF16),
    ("llama", BF16 | FUSED),
    ("llama", {"checkpoint": True}),
    ("gpt2", BF16),  # tied ends: the head's weight is cast in each micro-batch
    ("Gemma", BF16 | FUSED),
    ("GPT-NeoX", {}),
    ("Falcon", BF16),
    ("Mixtral", {}),
    ("llama", BF16 | FUSED | SELECTIVE),
    ("Mixtral", BF16 | SELECTIVE),  # its router saves a softmax, which is made again
]


def model_in_float32(name: str, frozen: str) -> nn.Module:
    model = make_model(name).float()
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in path)
    return model


def predicted_and_measured(
    rank: int, name: str, plan: dict[str, Any], frozen: str = ""
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each stage and region, of those that keep any, on this rank."""
    model = model_in_float32(name, frozen)
    program = ilm_compile.partition(model, example_inputs=EXAMPLE, **plan)
    parallel = ilm_compile.parallelize(model, example_inputs=EXAMPLE, **plan)
    measured = SavedBytes(parallel.stages)
    measured.start()
    parallel.execute_schedule(make_batch(ROWS * parallel.step_inputs.layout.num_slices))
    measured.stop()
    return by_name(program, {stage.index for stage in parallel.stages}), {
        f"{stage} {region}": size
        for stage, regions in measured.bytes.items()
        for region, size in regions.items()
    }


def by_name(program: Program, stages: set[int]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for (stage, region), size in saved_bytes(program).items():
        if stage in stages and size:
            found[f"{stage} {program.regions[region].name.replace('.', '_')}"] += size
    return dict(found)


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_one_process_keeps_what_was_predicted(name: str, plan: dict[str, Any]) -> None:
    predicted, measured = predicted_and_measured(0, name, plan)
    assert len(measured) >= 3
    assert predicted == measured


def test_what_is_frozen_keeps_less() -> None:
    predicted, measured = predicted_and_measured(0, "internlm2", {}, "feed_forward")
    assert predicted == measured
    assert sum(measured.values()) < sum(predicted_and_measured(0, "internlm2", {})[1].values())


@pytest.mark.parametrize(
    "plan",
    [
        {"tp": 2, "sequence_parallel": True},
        {"pp": 2, "num_chunks": 2, "checkpoint": True},
        {**BF16, "zero": 3, "num_microbatches": 2},
        {"cp": 2},
        {"tp": 2, "sequence_parallel": True, **SELECTIVE},
        {"tp": 2, "sequence_parallel": True, "async_tensor_parallel": True, **BF16},
    ],
    ids=str,
)
def test_two_ranks_keep_what_was_predicted(world2: World, plan: dict[str, Any]) -> None:
    for predicted, measured in world2.run(predicted_and_measured, "internlm2", plan):
        assert predicted == measured


def test_explain_says_it_for_each_block_and_stage() -> None:
    torch.manual_seed(0)
    program = ilm_compile.partition(MODELS["internlm2"](), example_inputs=EXAMPLE, pp=2)
    said = program.explain()
    saved = saved_bytes(program)
    blocks = [i for i, region in enumerate(program.regions) if region.is_block]
    for stage in (0, 1):
        total = sum(size for (at, _), size in saved.items() if at == stage)
        assert f"{total:,} B" in said
    assert f"layers.3  {saved[1, blocks[3]]:,} B" in said.replace("    ", "  ")
