"""FuseKernels: what it finds in a model, what it leaves and why, and that it trains alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import PlanError
from ilm_compile.kernels import attention
from ilm_compile.models.rotary import even_then_odd, rotate
from ilm_compile.passes import FuseKernels
from ilm_compile.program.dump import target_name
from ilm_compile.proof import zoo as small
from tests.program.execute import run_program
from tests.support.fused import (
    ADD_LAYER_NORM,
    ADD_NORM,
    GLU,
    LAYER_NORM,
    NORM,
    OURS,
    QKV,
    ROTARY,
    Body,
    count,
    fused,
    fused_model,
    traced,
    traced_model,
)

aten, ilm = torch.ops.aten, torch.ops.ilm
# The fused ops of the second of two blocks; each model has one add_rms_norm more, before its head.
LLAMA = {ADD_NORM: 2, ROTARY: 1, GLU: 1}
BLOCKS: dict[str, dict[str, int]] = {
    "Llama": LLAMA,
    "InternLM3": LLAMA,
    "Phi-3": LLAMA,
    "Qwen3": {**LLAMA, NORM: 2},
    "Gemma": LLAMA,
    "Gemma-2": {**LLAMA, NORM: 2},  # it norms what it adds, too
    "GPT-NeoX": {ADD_LAYER_NORM: 1, LAYER_NORM: 1, ROTARY: 1},  # two norms of one sum
    "GPT-J": {ADD_LAYER_NORM: 1, ROTARY: 1},
    "GPT-2": {ADD_LAYER_NORM: 2},
    "Cohere": {ROTARY: 1, GLU: 1},
    "GLM-4": {**LLAMA, NORM: 2},
    "OLMo-2": {NORM: 4, ROTARY: 1, GLU: 1},  # it norms what it adds, not the sum
    "InternLM": LLAMA,
    "InternLM2": {ADD_NORM: 2, QKV: 1, GLU: 1},
    "InternLM2, sorted": {ADD_NORM: 2, QKV: 1, GLU: 1},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_matches_of_a_block(name: str) -> None:
    program = fused_model(name)
    (block,) = [r.name for r in program.regions if r.is_block and r.name.endswith(".1")]
    assert count(program, block) == BLOCKS[name]


@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_that_is_fused_stays_beside(name: str) -> None:
    plain = {"aten.rms_norm", "aten.layer_norm", "aten.rsqrt", "aten.silu"}
    plain |= {"aten.gelu"} if GLU in BLOCKS[name] else set()
    plain -= {"aten.rsqrt"} if name == "Cohere" else set()  # of its LayerNorm
    plain |= set() if name in OURS else {"aten.neg"}  # our tables take powers of negative numbers
    assert plain.isdisjoint(map(target_name, fused_model(name).calls()))


@pytest.mark.parametrize("name", BLOCKS)
def test_loss_and_gradients_are_those_of_the_plain_calls(name: str) -> None:
    model, program = traced_model(name)
    ids, labels = (torch.randint(small.VOCAB, (2, 16)) for _ in range(2))
    batch = {"input_ids": ids, "labels": labels}
    (values, gradients), (expected, wanted) = (
        run_program(p, model, batch) for p in (fused_model(name), program)
    )
    for key, value in expected.items():
        torch.testing.assert_close(values[key], value, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-10, atol=1e-10)


def spelled_out(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + 1e-6)


def half_turned(x: Tensor, at: int = 3) -> Tensor:
    return torch.cat((-x[..., at:], x[..., :at]), -1)


def doubled(angles: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat((angles, angles), -1)
    return both.cos(), both.sin()


def neighbours_turned(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def repeated(table: Tensor) -> Tensor:
    return table.repeat_interleave(2, -1)


def turned_alike(m: Body, x: Tensor, tables: tuple[Tensor, Tensor]) -> Any:
    cos, sin = tables
    return tuple(v * cos + half_turned(v) * sin for v in (x, 2 * x))


def silu_twice(m: Body, x: Tensor) -> Tensor:
    gate = F.silu(x)
    return gate * x + gate


def reads_half(m: Body, x: Tensor) -> Any:
    squares = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(squares + 1e-6), squares


def sorted_and_returned(m: Body, x: Tensor) -> Any:
    tables = m.angles.cos(), m.angles.sin()
    q, k = (rotate(even_then_odd(v), *tables) for v in (x, 2 * x))
    return attention(q, k, x), k


LEFT: dict[str, tuple[Callable[[Body, Tensor], Any], str]] = {
    "norm over another dim": (
        lambda m, x: spelled_out(x, 1),
        r"mean is over dimensions \[1\] of 4",
    ),
    "norm over two dims": (lambda m, x: spelled_out(x, (-2, -1)), r"over dimensions \[2, 3\]"),
    "rms_norm over two dims": (lambda m, x: F.rms_norm(x, (4, 6)), "norms over several dimensions"),
    "a mean that others read": (reads_half, "a value inside it is used elsewhere too"),
    "1/rms as a gate": (
        lambda m, x: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x.exp(),
        "its 1/rms does more than scale its input",
    ),
    "eps that is a tensor": (
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.trained[:1]),
        "its eps is a tensor",
    ),
    "unequal halves": (
        lambda m, x: x * m.weight + half_turned(x, 2) * m.weight,
        "turns 2 and 4 numbers, expected two halves",
    ),
    "halves of different tables": (
        lambda m, x: turned_alike(m, x, (torch.cat((m.angles.cos(), m.angles.sin()), -1),) * 2),
        "not proven to be two equal halves",
    ),
    "neighbours by tables of halves": (
        lambda m, x: x * doubled(m.angles)[0] + neighbours_turned(x) * doubled(m.angles)[1],
        "not proven to be two equal halves",
    ),
    "halves by tables of neighbours": (
        lambda m, x: x * repeated(m.angles.cos()) + half_turned(x) * repeated(m.angles.sin()),
        "not proven to be two equal halves",
    ),
    "trained tables": (
        lambda m, x: turned_alike(m, x, doubled(m.angles * m.trained)),
        "its tables are trained",
    ),
    "one value turned": (
        lambda m, x: rotate(x, m.angles.cos(), m.angles.sin()),
        "no second value is turned by the same tables",
    ),
    "a turned half that is not added": (
        lambda m, x: half_turned(x) * m.weight,
        "not multiplied and added to the other product",
    ),
    "silu used twice": (silu_twice, "its silu is used 2 times"),
    "gate that is a relu": (lambda m, x: F.relu(x) * m.weight.expand(x.shape), "gate is aten.relu"),
    "gelu of a skip": (lambda m, x: F.gelu(x) * 2.0, "its gelu is multiplied by no other value"),
    "gate that is broadcast": (lambda m, x: F.silu(m.weight) * x, "gate and up are not alike"),
}


@pytest.mark.parametrize("case", LEFT)
def test_near_misses_are_left_alone_with_the_reason(case: str) -> None:
    function, reason = LEFT[case]
    program = traced(function)
    result = fused(program)
    assert count(result) == {}
    assert [n.target for n in result.calls()] == [n.target for n in program.calls()]
    (said,) = [d for d in result.decisions if "left alone" in d]
    assert re.search(reason, said), said


def gemma(m: Body, x: Tensor) -> Tensor:
    return (spelled_out(x.float()) * (1.0 + m.weight.float())).type_as(x)


def llama(m: Body, x: Tensor) -> Tensor:
    return m.weight * spelled_out(x.float()).to(x.dtype)


def weighted_in_float32(m: Body, x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (6,), m.weight.float(), 1e-6).to(x.dtype)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (llama, (1e-6, True, 0.0)),
        (gemma, (1e-6, False, 1.0)),
        (weighted_in_float32, (1e-6, False, 0.0)),
        (lambda m, x: F.rms_norm(x, (6,), m.weight), (torch.finfo(torch.bfloat16).eps, False, 0.0)),
    ],
    ids=["llama", "gemma", "float32", "eps of the dtype"],
)
def test_norm_of_a_bfloat16_model_takes_in_its_casts(function: Any, options: Any) -> None:
    program = fused(traced(function, torch.bfloat16))
    (norm,) = program.graph.find_nodes(op="call_function", target=ilm.rms_norm.default)
    assert norm.args[2:] == options
    assert norm.args[1].target == "weight"
    assert norm.args[0].target is aten.mul.Tensor
    assert not program.graph.find_nodes(op="call_function", target=aten.to.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_glu_of_two_parts_of_one_projection(name: str) -> None:
    def function(m: Body, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return ACTIVATIONS[name](gate) * up

    program = fused(traced(function))
    (node,) = program.graph.find_nodes(op="call_function", target=ilm.glu.default)
    assert node.args[2] == name
    assert count(program) == {GLU: 1}
    model, batch = Body(function), {"x": torch.randn(2, 4, 4, 6, dtype=torch.float64)}
    found, gradients = run_program(program, model, batch)
    expected = model(**batch)["loss"]
    torch.testing.assert_close(found["loss"], expected, rtol=1e-12, atol=1e-12)
    (wanted,) = torch.autograd.grad(expected, [model.scale])
    torch.testing.assert_close(gradients["scale"], wanted, rtol=1e-12, atol=1e-12)


def test_numbers_stay_in_their_places_only_where_an_attention_alone_reads_them() -> None:
    def scored(m: Body, x: Tensor) -> Tensor:
        return sorted_and_returned(m, x)[0]

    def keys_as_values(m: Body, x: Tensor) -> Tensor:
        tables = m.angles.cos(), m.angles.sin()
        q, k = (rotate(even_then_odd(v), *tables) for v in (x, 2 * x))
        return attention(q, k, k) * m.weight

    for function, interleaved in (
        (scored, True),
        (sorted_and_returned, False),
        (keys_as_values, False),
    ):
        program = fused(traced(function))
        (node,) = program.graph.find_nodes(op="call_function", target=ilm.rotary.default)
        assert node.args[-1] is interleaved
        model, batch = Body(function), {"x": torch.randn(2, 4, 4, 6, dtype=torch.float64)}
        expected, found = model(**batch), run_program(program, model, batch)[0]
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-12, atol=1e-12)


def interleaved(m: Body, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * repeated(cos) + neighbours_turned(x) * repeated(sin)


def first_four(m: Body, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((interleaved(m, x[..., :4], cos[..., :2], sin[..., :2]), x[..., 4:]), -1)


def written_out(m: Body, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


@pytest.mark.parametrize("turn", [interleaved, first_four, written_out], ids=lambda f: f.__name__)
def test_neighbours_that_turn(turn: Any) -> None:
    def function(m: Body, x: Tensor) -> Any:
        both = [turn(m, v, m.angles.cos(), m.angles.sin()) for v in (x, 2 * x)]
        return tuple(v * m.weight for v in both)

    program = fused(traced(function))
    (node,) = program.graph.find_nodes(op="call_function", target=ilm.rotary.default)
    assert node.args[-1] is True
    model, batch = Body(function), {"x": torch.randn(2, 4, 4, 6, dtype=torch.float64)}
    found, gradients = run_program(program, model, batch)
    expected = model(**batch)["loss"]
    torch.testing.assert_close(found["loss"], expected, rtol=1e-12, atol=1e-12)
    for name in ("scale", "weight"):
        (wanted,) = torch.autograd.grad(expected, [getattr(model, name)], retain_graph=True)
        torch.testing.assert_close(gradients[name], wanted, rtol=1e-12, atol=1e-12)


def test_tables_made_alike_of_other_angles_turn_no_pair() -> None:
    def function(m: Body, x: Tensor) -> Any:
        cos, sin = m.angles.cos(), m.angles.sin()
        return interleaved(m, x, cos, sin), interleaved(m, 2 * x, sin, cos)

    result = fused(traced(function))
    assert count(result) == {}
    assert any("no second value is turned by the same tables" in d for d in result.decisions)


def test_neighbours_turned_in_float32_take_in_the_casts() -> None:
    def function(m: Body, x: Tensor) -> Any:
        cos, sin = m.angles.float().cos(), m.angles.float().sin()
        return tuple(interleaved(m, v.float(), cos, sin).to(v.dtype) for v in (x, 2 * x))

    program = fused(traced(function, torch.bfloat16))
    (node,) = program.graph.find_nodes(op="call_function", target=ilm.rotary.default)
    assert [n.meta["val"].dtype for n in node.args[:3]] == [torch.bfloat16] * 2 + [torch.float32]


def test_unknown_patterns_are_refused() -> None:
    with pytest.raises(PlanError, match=r"unknown patterns \['norm'\]"):
        FuseKernels(patterns=("norm",))
