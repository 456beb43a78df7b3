"""Weights that a stage computes with in 16 bits are cast once a step, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import ilm_compile
from ilm_compile import partitioning as front_door
from ilm_compile.errors import PlanError
from ilm_compile.passes import lower
from ilm_compile.program.lowered import LoweredProgram, Stage
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.runtime import Mesh
from ilm_compile.runtime.data_parallel import ShardedSync
from ilm_compile.runtime.forms import dress
from ilm_compile.runtime.low_weights import gather_low
from ilm_compile.runtime.observe.saved import SavedBytes
from tests.support.equality import EXAMPLE, ROWS, make_batch, make_model
from tests.support.world import World

BF16 = torch.bfloat16


def lower_with_casts(program: Program) -> LoweredProgram:
    """The program with every cast of a weight in the graph, run in every micro-batch."""
    lowered = lower(program)
    return replace(lowered, stages=tuple(replace(s, read_as={}) for s in lowered.stages))


def make_parallel(
    model: str, plan: dict[str, Any], *, cast_in_graph: bool, frozen: str = "nothing"
) -> ilm_compile.Parallel:
    plan = dict(plan)
    made: nn.Module = make_model(model).to(plan.pop("held_in", torch.float32))
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(frozen not in name)
    with mock.patch.object(front_door, "lower", lower_with_casts if cast_in_graph else lower):
        return ilm_compile.parallelize(made, example_inputs=EXAMPLE, **plan)


def train(
    rank: int, model: str, plan: dict[str, Any], frozen: str, cast_in_graph: bool
) -> dict[str, Tensor]:
    """The losses of two steps, and all gradients and weights after them."""
    parallel = make_parallel(model, plan, cast_in_graph=cast_in_graph, frozen=frozen)
    trainer = ilm_compile.Trainer(parallel, lr=1e-2)
    seen: dict[str, Tensor] = {}
    rows = ROWS * parallel.step_inputs.layout.num_slices
    for step in range(2):
        trainer.zero_grad()
        loss = trainer.execute_schedule(make_batch(rows))
        seen[f"loss {step}"] = loss.clone()
        seen |= {f"gradient {n}": g for n, g in parallel.full_gradients().items()}
        trainer.step()
    return {**seen, **parallel.full_state_dict()}


BF16_PLAN = {"dtype": BF16, "num_microbatches": 2}
ONE = [
    ("internlm2", BF16_PLAN, "nothing"),
    ("internlm2", {**BF16_PLAN, "checkpoint": True}, "attention"),
    ("gpt2", {"dtype": torch.float16, "num_microbatches": 4}, "nothing"),  # tied ends
    ("llama", {"held_in": BF16, "num_microbatches": 2}, "nothing"),  # master weights
]
TWO = [
    ("internlm2", {**BF16_PLAN, "zero": 3, "checkpoint": True}, "feed_forward"),
    ("three heads", BF16_PLAN, "nothing"),
    ("internlm2", {**BF16_PLAN, "tp": 2, "sequence_parallel": True}, "nothing"),
    ("gpt2", {**BF16_PLAN, "pp": 2}, "nothing"),  # tied ends on two stages
]


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    assert len(ours) > 4
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(("model", "plan", "frozen"), ONE)
def test_one_process_gets_the_same_bits(model: str, plan: dict[str, Any], frozen: str) -> None:
    ours, theirs = (train(0, model, plan, frozen, in_graph) for in_graph in (False, True))
    assert not differing(ours, theirs)


@pytest.mark.parametrize(("model", "plan", "frozen"), TWO)
def test_two_ranks_get_the_same_bits(
    world2: World, model: str, plan: dict[str, Any], frozen: str
) -> None:
    ours, theirs = (
        world2.run(train, model, plan, frozen, in_graph)[0] for in_graph in (False, True)
    )
    assert not differing(ours, theirs)


class OneWeight(nn.Module):
    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(shape[0] * shape[1]).view(shape) + 1 / 3)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.weight.dtype)
        return torch.nn.functional.linear(x, self.weight.to(BF16))


def gather_and_reduce(
    rank: int, shape: tuple[int, int], dim: int
) -> tuple[list[torch.dtype], Tensor, Tensor]:
    """What the weight was gathered in, the result for the unit matrix, and its whole gradient."""
    mesh = Mesh.create(Plan()).device_mesh
    assert mesh is not None
    module = OneWeight(shape)
    fully_shard(module, mesh=mesh["dp"], shard_placement_fn=lambda _: Shard(dim))
    stage = Stage(0, module, (), (), (), ("loss",), {"weight": "weight"}, {"weight": BF16})
    gather_low(module, stage, stage.read_as)
    sync = ShardedSync(module, zero=3)
    unit = torch.eye(shape[1], dtype=BF16)
    sync.defer()
    module(unit).sum().backward()
    sync.resume()
    out = module(unit * 2.0**-9)
    out.sum().backward()
    grad = module.weight.grad
    assert isinstance(grad, DTensor)
    return module.seen, out.detach() * 2.0**9, grad.full_tensor()


@pytest.mark.parametrize(
    ("shape", "dim"), [((4, 3), 0), ((5, 3), 0), ((1, 3), 0), ((3, 4), 1)], ids=str
)
def test_shards_are_cast_before_they_are_gathered(
    world2: World, shape: tuple[int, int], dim: int
) -> None:
    seen, result, gradient = world2.run(gather_and_reduce, shape, dim)[0]
    assert seen == [BF16, BF16]
    torch.testing.assert_close(result, OneWeight(shape).weight.detach().to(BF16).t())
    # Of two ranks and two micro-batches; bf16 would have lost the second.
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full(shape, 2 * (1 + 2.0**-9)))


def saved_of_blocks(*, cast_in_graph: bool) -> list[int]:
    parallel = make_parallel("internlm2", {"dtype": BF16}, cast_in_graph=cast_in_graph)
    saved = SavedBytes(parallel.stages)
    saved.start()
    parallel.execute_schedule(make_batch(ROWS))
    saved.stop()
    return [num_bytes for name, num_bytes in saved.bytes[0].items() if name.startswith("layers")]


def test_a_block_saves_no_copy_of_its_weights() -> None:
    ours, before = (saved_of_blocks(cast_in_graph=in_graph) for in_graph in (False, True))
    block = make_model("internlm2").get_submodule("layers.1")
    copies = sum(2 * p.numel() for p in block.parameters() if p.dim() == 2)
    assert copies == 122_880
    assert [a - b for a, b in zip(before, ours, strict=True)] == [copies] * len(ours)


def test_all_shapes_must_read_a_weight_alike() -> None:
    parallel = make_parallel("internlm2", {"dtype": BF16}, cast_in_graph=False)
    (stage,) = parallel.stages
    with pytest.raises(PlanError, match=r"layers\.0\.attention\.wqkv\.weight"):
        dress(stage, replace(stage, read_as={}), 1, torch.device("cpu"))


def test_evaluation_reads_what_was_trained_last() -> None:
    parallel = make_parallel("internlm2", {"dtype": BF16}, cast_in_graph=False)
    parameters = dict(parallel.named_parameters())
    before = parallel.execute_schedule(make_batch(ROWS), forward_only=True)
    with torch.no_grad():
        for name in parallel.stages[0].read_as:
            parameters[name].data.mul_(1.5)  # does not touch the version of the tensor
    assert parallel.execute_schedule(make_batch(ROWS), forward_only=True) != before
