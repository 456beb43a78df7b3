"""Lowered programs compute what the model computes: loss and every gradient, in any division."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ilm_compile import partition
from ilm_compile.errors import ProgramError
from ilm_compile.models import internlm2_tiny, internlm_tiny
from ilm_compile.passes import (
    ActivationCheckpoint,
    PipelineSplit,
    TensorParallel,
    lower,
    run_passes,
)
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from tests.support.models import hf_llama_like, random_tokens
from tests.support.promote import promoted_float32, to_float64
from tests.support.stages import model_loss_and_grads, staged_outputs_and_grads
from tests.support.tiny_model import SEQ, VOCAB, TinyTransformer

Inputs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(
        GPT2Config(
            **sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, eos_token_id=0, bos_token_id=0
        )
    )


def llama() -> nn.Module:
    return hf_llama_like(internlm2_tiny(vocab_size=VOCAB, hidden_size=32))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tiny": TinyTransformer,
    "tiny with skip, tied weights and an early output": lambda: TinyTransformer(
        skip=True, tied=True, early=True
    ),
    "internlm": lambda: internlm_tiny(vocab_size=VOCAB, hidden_size=32),
    "internlm2 with norm_head": lambda: internlm2_tiny(
        vocab_size=VOCAB, hidden_size=32, norm_head=True
    ),
    "HF llama": llama,
    "HF gpt2, tied weights": gpt2,
}
INPUTS: Inputs = {"input_ids": ((2, SEQ), torch.int64), "labels": ((2, SEQ), torch.int64)}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = to_float64(MODELS[name]())
    input_ids, labels = random_tokens(2, SEQ, VOCAB)
    return model, {"input_ids": input_ids, "labels": labels}


def compile_(model: nn.Module, num_stages: int, checkpoint: float = 0.0) -> LoweredProgram:
    with promoted_float32():
        program = trace(model, example_inputs=INPUTS)
    passes = [PipelineSplit(num_stages=num_stages), ActivationCheckpoint(fraction=checkpoint)]
    run_passes(program, passes)
    return lower(program)


class CountCalls(TorchDispatchMode):
    """Counts the calls of each op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] = self.calls.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-10, atol=1e-10 * value.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_stages_equal_the_model(name: str, num_stages: int) -> None:
    model, batch = build(name)
    with promoted_float32():
        loss, grads = model_loss_and_grads(model, batch)
    outputs, staged_grads = staged_outputs_and_grads(compile_(model, num_stages), model, batch)
    assert_equal({"loss": outputs["loss"]}, {"loss": loss})
    assert_equal(staged_grads, grads)


@pytest.mark.parametrize("num_stages", [1, 4])
@pytest.mark.parametrize(("fraction", "num_recomputed"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_recompute_runs_blocks_twice(num_stages: int, fraction: float, num_recomputed: int) -> None:
    model, batch = build("tiny")
    loss, grads = model_loss_and_grads(model, batch)
    lowered = compile_(model, num_stages, fraction)
    with CountCalls() as count:
        outputs, staged_grads = staged_outputs_and_grads(lowered, model, batch)
    assert count.calls["aten.silu.default"] == 4 + num_recomputed
    assert count.calls["aten.cos.default"] <= num_stages  # clones are not recomputed
    assert_equal({"loss": outputs["loss"], **staged_grads}, {"loss": loss, **grads})


def test_recompute_draws_the_same_dropout() -> None:
    torch.manual_seed(0)
    model = to_float64(TinyTransformer(dropout=0.5))
    _, batch = build("tiny")
    batch = {**batch, "dropout_seed": torch.tensor(3)}
    results = []
    for fraction in (0.0, 1.0):
        lowered = compile_(model, 1, fraction)
        outputs, grads = staged_outputs_and_grads(lowered, model, batch)
        results.append({**outputs, **grads})
    assert_equal(*results)


def test_random_state_is_not_kept_for_dropout_which_has_a_seed() -> None:
    kept = [
        [
            child.is_random
            for child in compile_(model, 1, 0.5).stages[0].module.children()
            if hasattr(child, "is_random")
        ]
        for model in (TinyTransformer().double(), TinyTransformer(dropout=0.5).double())
    ]
    assert kept == [[False, False], [False, False]]


@pytest.mark.parametrize("name", ["tiny", "HF llama", "HF gpt2, tied weights"])
def test_only_floating_point_values_made_by_parameters_are_sent(name: str) -> None:
    model, _ = build(name)
    for stage in compile_(model, 4).stages[1:]:
        assert [(b.dtype, b.requires_grad) for b in stage.received] == [(torch.float64, True)]


def test_stages_take_the_batch_inputs_they_use() -> None:
    lowered = compile_(build("tiny")[0], 4)
    assert [s.batch_inputs for s in lowered.stages] == [
        ("input_ids",),
        (),
        (),
        ("labels", "num_targets"),
    ]


def test_outputs_come_from_the_last_stage_loss_first() -> None:
    model, batch = build("tiny with skip, tied weights and an early output")
    lowered = compile_(model, 4)
    outputs, _ = staged_outputs_and_grads(lowered, model, batch)
    assert [s.outputs for s in lowered.stages] == [(), (), (), ("loss", "logits", "early")]
    assert_equal(outputs, {name: value.detach() for name, value in model(**batch).items()})


def test_relayed_output_carries_no_gradient() -> None:
    lowered = compile_(build("tiny with skip, tied weights and an early output")[0], 4)
    stages = [stage for stage in lowered.stages if any(b.name == "add_1" for b in stage.received)]
    flags = [[b.requires_grad for b in s.received if b.name == "add_1"] for s in stages]
    assert flags[0] == [True]  # the next block computes with it
    assert flags[-1] == [False]  # the last stage only returns it


def test_children_are_the_regions_in_order() -> None:
    lowered = compile_(build("tiny")[0], 2, 0.5)
    children = [[name for name, _ in s.module.named_children()] for s in lowered.stages]
    assert children == [
        ["shared", "prologue", "blocks_0", "blocks_1"],
        ["shared", "blocks_2", "blocks_3", "epilogue"],
    ]


def test_variables_lie_in_their_region_under_flat_names() -> None:
    lowered = compile_(build("tiny")[0], 2, 0.5)
    variables = lowered.stages[0].variables
    assert variables["blocks.0.qkv.weight"] == "blocks_0.blocks_0_qkv_weight"
    assert variables["blocks.1.qkv.weight"] == "blocks_1.body.blocks_1_qkv_weight"
    assert variables["frequency"] == "shared.frequency"


def test_variable_of_several_regions_lives_on_the_stage() -> None:
    lowered = compile_(build("tiny with skip, tied weights and an early output")[0], 1)
    assert lowered.stages[0].variables["embed.weight"] == "embed_weight"
    assert isinstance(lowered.stages[0].module.embed_weight, nn.Parameter)


def test_tied_parameter_has_two_owners() -> None:
    lowered = compile_(build("HF gpt2, tied weights")[0], 4)
    assert lowered.owners("transformer.wte.weight") == (0, 3)
    assert lowered.owners("transformer.h.0.ln_1.weight") == (0,)


def test_parameters_are_rank_local_and_on_meta() -> None:
    program = replace(trace(internlm2_tiny()), plan=Plan(tp=2))
    run_passes(program, [TensorParallel(size=2), PipelineSplit(num_stages=2)])
    checked = 0
    for stage in lower(program).stages:
        for name, path in stage.variables.items():
            variable = program.variables[name]
            local = stage.module.get_parameter(path)
            assert local.is_meta
            assert tuple(local.shape) == variable.layout.local_shape(variable.shape, {"tp": 2})
            checked += tuple(local.shape) != variable.shape
    assert checked > 0


def test_constants_keep_their_values() -> None:
    program = trace(TinyTransformer())
    constant = torch.full((8,), 0.5)
    program.graph_module.frequency = constant
    (stage,) = lower(program).stages
    assert torch.equal(stage.module.get_buffer(stage.variables["frequency"]), constant)


def split_program() -> Program:
    program = trace(TinyTransformer())
    run_passes(program, [PipelineSplit(num_stages=2)])
    return program


def test_node_in_no_stage_is_refused() -> None:
    program = split_program()
    node = next(n for n in program.calls() if n.name == "linear_1")
    del node.meta["stage"]
    with pytest.raises(ProgramError, match=r"node linear_1 \(blocks.0.out, .* is in no stage"):
        lower(program)


def test_node_before_its_input_is_refused() -> None:
    program = split_program()
    node = next(n for n in program.calls() if n.name == "linear_1")
    node.meta["stage"] = 1
    with pytest.raises(ProgramError, match=r"is in stage 0, before its input linear_1 in stage 1"):
        lower(program)


def test_sending_an_integer_is_refused() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return (y * y.argmax(-1, keepdim=True)).sum()

    program = trace(Routed(), example_inputs={"x": ((2, 4), torch.float32)})
    for node in program.calls():
        node.meta["stage"] = int(node.name.startswith(("mul", "sum")))
    with pytest.raises(ProgramError, match=r"argmax .* has dtype torch.int64 and would be sent"):
        lower(program)


def test_a_plan_with_context_parallelism_that_no_pass_carried_out_is_refused() -> None:
    """Else every rank would have whole gradients, and the storage would add them up."""
    program = partition(internlm2_tiny(num_layers=1), cp=2, disable=["context-parallel"])
    with pytest.raises(ProgramError, match="the plan has cp=2, but no pass has sharded"):
        lower(program)
