"""What runs in bf16 and what in float32, and that it trains the same up to rounding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ilm_compile.errors import PlanError
from ilm_compile.models import internlm2_tiny, internlm_tiny
from ilm_compile.passes import (
    ActivationCheckpoint,
    CastBF16,
    CastFP16,
    PipelineSplit,
    TensorParallel,
    lower,
    run_passes,
)
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.program.vocab import vocab_cross_entropy
from tests.support.models import random_tokens
from tests.support.stages import model_loss_and_grads, staged_outputs_and_grads
from tests.support.tiny_model import SEQ, VOCAB, TinyTransformer

BF16, FP32 = torch.bfloat16, torch.float32


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tiny": lambda: TinyTransformer(tied=True),
    "internlm": lambda: internlm_tiny(vocab_size=VOCAB, hidden_size=32),
    "internlm2": lambda: internlm2_tiny(vocab_size=VOCAB, hidden_size=32),
    "HF llama": llama,
}
INPUTS = {"input_ids": ((2, SEQ), torch.int64), "labels": ((2, SEQ), torch.int64)}


def cast(model: nn.Module, plan: Plan | None = None, *others: TensorParallel) -> Program:
    program = replace(trace(model, example_inputs=INPUTS), plan=plan or Plan())
    run_passes(program, [*others, CastBF16()])
    return program


def dtypes(program: Program, op: str) -> set[torch.dtype]:
    """The dtypes of everything that calls of `op` compute with: inputs and results."""
    calls = [node for node in program.calls() if str(node.target).startswith(op)]
    assert calls, f"no {op}"
    values = [value for node in calls for value in (node, *node.all_input_nodes)]
    return {v.meta["val"].dtype for v in values if v.meta["val"].is_floating_point()}


def calls(program: Program, op: str) -> list[fx.Node]:
    return [node for node in program.calls() if str(node.target).startswith(op)]


@pytest.mark.parametrize(
    ("name", "op", "dtype"),
    [
        ("internlm2", "aten.linear", BF16),
        ("internlm2", "ilm.attention", BF16),
        ("internlm2", "aten.silu", BF16),
        ("internlm2", "aten.rms_norm", FP32),
        ("internlm2", "aten.cross_entropy_loss", FP32),
        ("internlm2", "aten.embedding", FP32),
        ("internlm2", "aten.cat", FP32),
        ("HF llama", "aten.scaled_dot_product_attention", BF16),
        ("HF llama", "aten.pow", FP32),
        ("HF llama", "aten.mean", FP32),
        ("HF llama", "aten.rsqrt", FP32),
        ("HF llama", "aten.cos", FP32),
        ("tiny", "aten.layer_norm", FP32),
    ],
    ids=lambda value: str(value),
)
def test_dtype_of_ops(name: str, op: str, dtype: torch.dtype) -> None:
    # The cat of InternLM2 is the end of the rotation.
    assert dtypes(cast(MODELS[name]()), op) == {dtype}


def test_residual_stream_is_bf16() -> None:
    program = cast(MODELS["internlm2"]())
    residual = [
        n for n in calls(program, "aten.add") if program.source(n).module_path == "layers.1"
    ]
    assert {node.meta["val"].dtype for node in residual} == {BF16}


def test_parameters_stay_float32() -> None:
    program = cast(MODELS["internlm2"]())
    assert {node.meta["val"].dtype for node in program.graph.find_nodes(op="get_attr")} == {FP32}


def test_one_cast_serves_all_users_in_a_block() -> None:
    program = cast(MODELS["internlm2"]())
    norm = calls(program, "aten.rms_norm")[1]
    (rounded,) = norm.users
    assert {str(user.target) for user in rounded.users} == {"aten.linear.default"}
    assert len(rounded.users) == 2


def test_blocks_do_not_share_casts() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.layers[1].weight = self.layers[0].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x)).sum()

    program = trace(Shared(), example_inputs={"x": ((2, 4), FP32)})
    run_passes(program, [CastBF16()])
    (weight,) = (
        n for n in program.graph.find_nodes(op="get_attr") if str(n.target).endswith("weight")
    )
    assert [user.meta["region"] for user in weight.users] == [1, 2]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_stages", [1, 4])
def test_loss_and_gradients_are_close_to_float32(name: str, num_stages: int) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    input_ids, labels = random_tokens(2, SEQ, VOCAB)
    batch = {"input_ids": input_ids, "labels": labels}
    loss, grads = model_loss_and_grads(model, batch)
    program = cast(model)
    run_passes(program, [ActivationCheckpoint(fraction=0.5), PipelineSplit(num_stages=num_stages)])
    outputs, cast_grads = staged_outputs_and_grads(lower(program), model, batch)
    torch.testing.assert_close(outputs["loss"], loss, rtol=CastBF16.tolerance, atol=0)
    assert outputs["loss"].dtype == FP32
    for key, grad in grads.items():
        assert cast_grads[key].dtype == FP32
        error = (cast_grads[key] - grad).norm() / grad.norm()
        assert error < 0.05, (key, error)
    assert max((cast_grads[key] - grad).abs().max() for key, grad in grads.items()) > 0


def test_float16_takes_the_places_of_bf16_with_more_digits() -> None:
    torch.manual_seed(0)
    model = MODELS["internlm2"]()
    input_ids, labels = random_tokens(2, SEQ, VOCAB)
    batch = {"input_ids": input_ids, "labels": labels}
    loss, grads = model_loss_and_grads(model, batch)
    program = trace(model, example_inputs=INPUTS)
    run_passes(program, [CastFP16()])
    places = [[str(n.meta["val"].dtype) for n in p.calls()] for p in (program, cast(model))]
    assert [d.replace("float16", "bfloat16") for d in places[0]] == places[1]
    run_passes(program, [ActivationCheckpoint(fraction=0.5), PipelineSplit(num_stages=1)])
    outputs, cast_grads = staged_outputs_and_grads(lower(program), model, batch)
    torch.testing.assert_close(outputs["loss"], loss, rtol=CastFP16.tolerance, atol=0)
    for key, grad in grads.items():
        assert cast_grads[key].dtype == FP32
        assert (cast_grads[key] - grad).norm() / grad.norm() < 0.01, key


class DtypeRecorder(fx.Interpreter):
    """Runs a graph and notes the dtype of each value."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.seen: dict[str, torch.dtype] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.seen[n.name] = result.dtype
        return result


@pytest.mark.parametrize("name", MODELS)
def test_values_say_what_the_graph_computes(name: str) -> None:
    model = MODELS[name]()
    program = cast(model)
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        owner, _, leaf = key.rpartition(".")
        if key in program.variables and any(
            n.target == key for n in program.graph.find_nodes(op="get_attr")
        ):
            setattr(program.graph_module.get_submodule(owner), leaf, value)
    recorder = DtypeRecorder(program.graph_module)
    tokens = random_tokens(2, SEQ, VOCAB)
    recorder.run(*tokens, torch.tensor(16.0))
    expected = {n.name: n.meta["val"].dtype for n in program.graph.nodes if n.name in recorder.seen}
    assert recorder.seen == expected


def test_product_that_no_parameter_reaches_stays_exact() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            table = torch.arange(4.0, device=x.device)[:, None] @ torch.ones(1, 4, device=x.device)
            return (self.linear(x) * table.cos()).sum()

    program = trace(Positions(), example_inputs={"x": ((4, 4), FP32)})
    run_passes(program, [CastBF16()])
    assert dtypes(program, "aten.matmul") == {FP32}


def test_exact_round_trip_collapses_and_rounding_one_does_not() -> None:
    class Casts(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(4, 4, bias=False, dtype=dtype) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)).sum()

    class Up(Casts):
        def forward(self, x: Tensor) -> Tensor:
            return (self.b(self.a(x).float().to(x.dtype)).sum()).float()

    class Down(Casts):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).tanh().float().add(x.exp().bfloat16()).pow(2).sum()

    up = trace(Up(BF16), example_inputs={"x": ((2, 4), BF16)})
    run_passes(up, [CastBF16()])
    second = calls(up, "aten.linear")[1]
    assert str(second.all_input_nodes[0].target) == "aten.linear.default"

    down = trace(Down(FP32), example_inputs={"x": ((2, 4), FP32)})
    run_passes(down, [CastBF16()])
    (exponential,) = calls(down, "aten.exp")
    assert [node.args[1] for node in exponential.users] == [BF16]


def test_rounding_is_kept_before_an_op_in_float32() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (self.scale * x).exp().bfloat16().pow(2).sum().float()

    program = trace(Rounded(), example_inputs={"x": ((2, 4), FP32)})
    run_passes(program, [CastBF16()])
    (power,) = calls(program, "aten.pow")
    widened = power.all_input_nodes[0]
    rounded = widened.all_input_nodes[0]
    assert (widened.args[1], rounded.args[1]) == (FP32, BF16)


def test_bf16_model_gets_its_float32_parts() -> None:
    program = cast(TinyTransformer().bfloat16())
    assert dtypes(program, "aten.layer_norm") == {FP32}
    assert dtypes(program, "aten.cross_entropy_loss") == {FP32}
    assert dtypes(program, "aten.linear") == {BF16}
    (count,) = program.graph.find_nodes(op="placeholder", sort=True)[2:]
    assert (count.target, count.meta["val"].dtype) == ("num_targets", FP32)


def test_op_that_does_not_promote_gets_float32() -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            index = torch.zeros(4, 4, dtype=torch.int64, device=x.device)
            return self.scale.exp().scatter_add(0, index, self.linear(x)).sum()

    program = trace(Picked(), example_inputs={"x": ((4, 4), FP32)})
    run_passes(program, [CastBF16()])
    assert dtypes(program, "aten.scatter_add") == {FP32}


@pytest.mark.parametrize("name", ["ilm.grouped_product", "transformers.grouped_mm_fallback"])
def test_products_of_experts_are_low_as_all_products(name: str) -> None:
    library, op = name.split(".")
    if library == "transformers":
        pytest.importorskip("transformers.integrations.moe")
    product = getattr(getattr(torch.ops, library), op)

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 8, 8))
            self.register_buffer("ends", torch.tensor([1, 4], dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            return product(x, self.weight, self.ends).mean()

    program = trace(Grouped(), example_inputs={"x": ((4, 8), FP32)})
    run_passes(program, [CastBF16()])
    assert dtypes(program, name) == {BF16}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_sharded_program_passes_the_placement_check(sequence_parallel: bool) -> None:
    step = TensorParallel(size=2, sequence_parallel=sequence_parallel)
    program = cast(MODELS["internlm2"](), Plan(tp=2), step)
    assert dtypes(program, "aten.linear") == {BF16}
    assert all("layout" in node.meta for node in calls(program, "aten.to"))


def test_values_move_between_ranks_in_bf16_when_read_in_bf16() -> None:
    step = TensorParallel(size=2, sequence_parallel=True)
    program = cast(MODELS["internlm2"](), Plan(tp=2), step)
    for node in program.calls():
        val = node.meta["val"]
        is_move = node.target is redistribute and node.kwargs["src"] != "P"
        if is_move and val.is_floating_point() and val.dim() == 3 and val.dtype == FP32:
            assert any(not str(u.target).startswith("aten.to") for u in node.users), node


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_no_float32_copy_of_sharded_logits_is_made(dtype: torch.dtype) -> None:
    # In a bf16 model Hugging Face's loss widens the logits, so there is a cast to take away.
    program = cast(MODELS["HF llama"]().to(dtype), Plan(tp=2), TensorParallel(size=2))
    node = next(n for n in program.calls() if n.target is vocab_cross_entropy)
    while not str(node.target).startswith("aten.linear"):
        node = node.all_input_nodes[0]
        assert node.meta["val"].dtype == BF16, node
    assert program.outputs[0].meta["val"].dtype == FP32


def test_report_says_what_and_why() -> None:
    lines = CastBF16.report(cast(MODELS["internlm2"]())).splitlines()
    assert lines[0].split() == ["op", "count", "dtype", "why"]
    table = {tuple(line.split(maxsplit=3)[:3]): line for line in lines}
    assert "matrix product" in table["aten::linear", "21", "bfloat16"]
    assert "norm" in table["aten::rms_norm", "9", "float32"]
    assert "rotary tables" in table["aten::cos", "1", "float32"]


def test_float64_model_is_refused() -> None:
    with pytest.raises(PlanError, match=r"float32 or bfloat16, got embed.weight in torch.float64"):
        cast(TinyTransformer().double())
