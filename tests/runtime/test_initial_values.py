"""Initial values: real, drawn by the model itself, or rebuilt module by module; never by plan."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ilm_compile.errors import IlmCompileError, ProgramError
from ilm_compile.program.placement import I, Placement, S, join_shards
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Variable
from ilm_compile.runtime import Mesh
from ilm_compile.runtime.initial_values import InitialValues
from ilm_compile.runtime.materialize import Binding, fill, finish
from tests.runtime.handmade import Model, lower_by_hand, make_model
from tests.support.layouts import tp, tp_place


def variable(
    name: str, tensor: Tensor, placement: Placement = I, dtype: torch.dtype | None = None
) -> Variable:
    is_parameter = isinstance(tensor, nn.Parameter)
    dtype = dtype or tensor.dtype
    return Variable(name, tuple(tensor.shape), dtype, is_parameter, True, layout=tp(placement))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


PLACEMENTS = [S(0), S(1), S(0, (4, 4)), I]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize("kind", ["real", "drawn", "rebuilt"])
def test_shards_join_to_the_same_bits(placement: Placement, kind: str) -> None:
    torch.manual_seed(0)
    model = Mlp() if kind == "real" else Mlp().to("meta")
    table = torch.randn(8, 6)

    def initializer(name: str, *, rows: tuple[int, int] | None = None, seed: int) -> Tensor:
        start, stop = rows or (0, 8)
        return (table + seed)[start:stop]

    def values() -> InitialValues:
        return InitialValues(model, seed=7, initializer=initializer if kind == "drawn" else None)

    weight = variable("up.weight", model.up.weight, placement)
    whole = values().shard(variable("up.weight", model.up.weight))
    shards = [values().shard(weight, tp_place(rank, 2)) for rank in range(2)]
    joined = join_shards(shards, placement) if placement.is_shard else shards[1]
    assert torch.equal(joined, whole)
    if kind == "real":
        assert torch.equal(whole, model.up.weight)
    if kind == "drawn":
        assert torch.equal(whole, table + 7)


def test_only_the_wanted_rows_are_drawn() -> None:
    asked: list[Any] = []

    def initializer(name: str, *, rows: tuple[int, int] | None = None, seed: int) -> Tensor:
        asked.append((name, rows, seed))
        return torch.zeros(2, 6)

    model = Mlp().to("meta")
    values = InitialValues(model, seed=7, initializer=initializer)
    part = values.shard(variable("up.weight", model.up.weight, S(0)), tp_place(3, 4))
    assert asked == [("up.weight", (6, 8), 7)]
    assert part.shape == (2, 6)


@pytest.mark.parametrize("placement", [S(0), S(1), I], ids=str)
def test_drawn_values_take_the_dtype_of_the_model(placement: Placement) -> None:
    model = Mlp().to(device="meta", dtype=torch.float64)
    draw = lambda name, rows=None, seed=0: torch.ones(8, 6)  # noqa: E731
    values = InitialValues(model, seed=7, initializer=draw)
    weight = variable("up.weight", model.up.weight, placement)
    assert values.shard(weight).dtype == torch.float64


def test_rebuilt_values_depend_on_the_seed_and_the_name_alone() -> None:
    model = Mlp().to("meta")
    names = ["up.weight", "down.weight", "up.bias"]

    def read(order: list[str], seed: int) -> dict[str, Tensor]:
        values = InitialValues(model, seed=seed)
        torch.rand(1)  # the global generator must not matter, nor be disturbed
        return {name: values.shard(variable(name, model.get_parameter(name))) for name in order}

    state = torch.get_rng_state()
    first, again, other = read(names, 1), read(names[::-1], 1), read(names, 2)
    torch.set_rng_state(state)
    for name in names:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["up.weight"].flatten(), first["down.weight"].flatten())
    bound = 6**-0.5  # torch's own initialisation of nn.Linear
    assert 0.5 * bound < first["up.weight"].abs().max() <= bound


def test_rebuilt_modules_of_one_kind_draw_different_numbers() -> None:
    model = nn.ModuleList(nn.Linear(6, 8) for _ in range(3)).to("meta")
    values = InitialValues(model, seed=1)
    drawn = [
        values.shard(variable(name, parameter))
        for name, parameter in model.named_parameters()
        if name.endswith("weight")
    ]
    assert not any(torch.equal(drawn[i], drawn[j]) for i, j in ((0, 1), (1, 2), (0, 2)))


def test_values_may_be_given_as_tensors() -> None:
    model = Mlp()
    given = dict(model.named_parameters())
    values = InitialValues(given, seed=1)
    weight = variable("up.weight", model.up.weight)
    assert torch.equal(values.shard(weight), model.up.weight)
    with pytest.raises(IlmCompileError, match=r"needs table of shape \(4,\), which is not among"):
        values.shard(variable("table", model.table))


def test_rebuilding_leaves_the_global_generator_alone() -> None:
    model = Mlp().to("meta")
    state = torch.get_rng_state()
    InitialValues(model, seed=1).shard(variable("up.weight", model.up.weight))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.up.weight.is_meta


def test_a_buffer_nobody_computes_is_named() -> None:
    model = Mlp().to("meta")
    values = InitialValues(model, seed=1)
    with pytest.raises(
        IlmCompileError, match=r"nothing computes the buffer table; expected Mlp.reset_parameters"
    ):
        values.shard(variable("table", model.table))


def test_materialising_copies_and_keeps_sharing() -> None:
    model = make_model(tied=True)
    lowered = lower_by_hand(Plan(), tied=True)
    (stage,) = lowered.stages
    values = InitialValues(model, seed=1)
    fill(stage, stage.variables, lowered.variables, values, Mesh.create(Plan()))
    finish(stage, Binding(torch.device("cpu")))
    module = stage.module
    assert module.prologue.embed is module.epilogue.head
    assert torch.equal(module.prologue.embed, model.embed)
    assert module.prologue.embed.data_ptr() != model.embed.data_ptr()
    assert not module.epilogue.frozen.requires_grad
    assert torch.equal(module.prologue.scale, model.scale)


def test_a_tensor_left_on_meta_is_refused() -> None:
    (stage,) = lower_by_hand(Plan()).stages
    with pytest.raises(ProgramError, match="embed of _Prologue in stage 0 got no value"):
        finish(stage, Binding(torch.device("cpu")))


def test_a_model_of_another_shape_is_refused() -> None:
    lowered = lower_by_hand(Plan())
    (stage,) = lowered.stages
    model = Model().double()
    model.embed = nn.Parameter(torch.zeros(3, 6, dtype=torch.float64))
    values = InitialValues(model, seed=1)
    with pytest.raises(ProgramError, match=r"expects embed of shape \(10, 6\).*gives \(3, 6\)"):
        fill(stage, ["embed"], lowered.variables, values, Mesh.create(Plan()))


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=32,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    config = transformers.GPT2Config(n_embd=64, n_layer=8, n_head=4, vocab_size=32, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_hugging_face_model_on_meta_is_initialised_as_on_the_cpu(kind: str) -> None:
    torch.manual_seed(0)
    real = hugging_face(kind)
    with torch.device("meta"):
        model = copy.deepcopy(hugging_face(kind))
    values = InitialValues(model, seed=1)
    for name, parameter in real.named_parameters():
        value = values.shard(variable(name, parameter))
        assert value.shape == parameter.shape
        if parameter.std() == 0 or parameter.numel() < 1000:
            continue
        assert value.std().item() == pytest.approx(parameter.std().item(), rel=0.15), name
        assert value.mean().abs() < 0.1 * value.std(), name
    for name, buffer in real.named_buffers():
        value = values.shard(variable(name, buffer))
        assert torch.equal(value, buffer), name
