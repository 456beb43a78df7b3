"""The Triton launchers under Triton's interpreter, beside the references on the same inputs.

Launchers are what runs: strides, grids, the choice of tables and the sum of the weight's gradient
over programs are covered with the kernels. On the CPU the persistent grid counts 2 multiprocessors.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ilm_compile.kernels import MAX_CENTERED
from ilm_compile.kernels.launch import flat_rows, row_stride
from ilm_compile.kernels.library import LAUNCHERS
from tests.kernels.accuracy import INTERPRETED, relative_error
from tests.kernels.worker import Worker

EPS = 1e-5
ilm = torch.ops.ilm
dtypes = pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
activations = pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])


def rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of different size, so that eps matters in some."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (x * torch.logspace(-3, 1, x.shape[-2])[:, None]).to(dtype)


def compare(interpreter: Worker, op: str, *args: Any) -> list[Tensor]:
    """What the launcher of `ilm::op` gives in the interpreter, held to the reference.

    Where cast_before_scale rounds inside, float32 results are as coarse as the dtype of the rows.
    """
    rows_dtype = args[0].dtype if any(arg is True for arg in args) else None
    found = interpreter.call(LAUNCHERS[f"ilm::{op}"], *args)
    expected = getattr(ilm, op)(*args)
    if isinstance(found, Tensor):
        found, expected = (found,), (expected,)
    for mine, other in zip(found, expected, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert mine.is_contiguous()
        assert relative_error(mine, other) < INTERPRETED[rows_dtype or mine.dtype]
    return list(found)


def norm_arguments(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (7, 100),
    weight_dtype: torch.dtype | None = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, a residual or total, a gradient, and a weight."""
    x, other, grad = (rows(shape, dtype, seed) for seed in range(3))
    weight = None if weight_dtype is None else torch.linspace(0.5, 1.5, shape[-1]).to(weight_dtype)
    return x, other, grad, weight


@dtypes
@pytest.mark.parametrize("cast", [False, True], ids=["", "cast"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(interpreter, dtype, cast, offset):
    x, _, grad, weight = norm_arguments(dtype)
    compare(interpreter, "rms_norm", x, weight, EPS, cast, offset)
    compare(interpreter, "rms_norm_backward", grad, x, weight, EPS, cast, offset)


@dtypes
def test_add_rms_norm(interpreter, dtype):
    x, residual, grad, weight = norm_arguments(dtype)
    y, total = compare(interpreter, "add_rms_norm", x, residual, weight, EPS)
    # the norm is of the sum as it was rounded, which the tolerances above would not show
    assert torch.equal(y, compare(interpreter, "rms_norm", total, weight, EPS)[0])
    # the gradient of the sum is random, not that of a loss: it is added after the norm's derivative
    grads = grad, rows(x.shape, dtype, seed=5)
    compare(interpreter, "add_rms_norm_backward", *grads, residual, weight, EPS, False, 0.0)


@pytest.mark.parametrize("cast", [False, True], ids=["", "cast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_add_rms_norm_with_a_float32_stream(interpreter, dtype, cast):
    x, residual, grad, weight = norm_arguments(dtype)
    stream = residual.float() + 2**-20
    _, total = compare(interpreter, "add_rms_norm", x, stream, weight, EPS, cast)
    assert torch.equal(total, x.float() + stream)
    args = grad, rows(x.shape, torch.float32, seed=5), total, weight, EPS, cast, 0.0
    to_residual, to_x, _ = compare(interpreter, "add_rms_norm_backward", *args)
    assert (to_residual.dtype, to_x.dtype) == (torch.float32, dtype)


def test_add_rms_norm_without_a_gradient_of_the_sum(interpreter):
    _, total, grad, weight = norm_arguments()
    compare(interpreter, "add_rms_norm_backward", grad, None, total, weight, EPS, False, 0.0)


@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16], ids=str)
def test_other_weights(interpreter, weight_dtype):
    x, residual, grad, weight = norm_arguments(torch.bfloat16, weight_dtype=weight_dtype)
    compare(interpreter, "add_rms_norm", x, residual, weight, EPS)
    compare(interpreter, "rms_norm", x, weight, EPS)
    compare(interpreter, "rms_norm_backward", grad, x, weight, EPS, False, 0.0)


# Each row of the tables of launches, at its width and below.
HIDDEN_SIZES = [1, 64, 128, 250, 512, 768, 1024, 2048, 4096, 5000, 5120, 6144, 8192, 9000, 16384]


@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
def test_hidden_sizes(interpreter, hidden):
    x, residual, grad, weight = norm_arguments(shape=(3, hidden))
    compare(interpreter, "add_rms_norm", x, residual, weight, EPS)
    args = grad, x, residual, weight, EPS, False, 0.0
    compare(interpreter, "add_rms_norm_backward", *args)


# A persistent grid of at most 2 x 4 programs of 1 row, or 2 x 6 of 16 rows.
@pytest.mark.parametrize(
    ("num_rows", "hidden"), [(1, 2048), (7, 2048), (8, 2048), (19, 2048), (1, 64), (200, 64)]
)
def test_more_and_fewer_rows_than_programs(interpreter, num_rows, hidden):
    x, _, grad, weight = norm_arguments(shape=(num_rows, hidden))
    compare(interpreter, "rms_norm", x, weight, EPS)
    compare(interpreter, "rms_norm_backward", grad, x, weight, EPS, False, 0.0)


def layer_arguments(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> list[Any]:
    """x, a residual or total, a gradient, a weight, a bias. The mean of a row is not 0."""
    x, other, grad, weight = norm_arguments(dtype, shape)
    shift = x.abs().amax(-1, keepdim=True)
    return [x + shift, other, grad, weight, torch.linspace(-1, 1, shape[-1]) if bias else None]


@dtypes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_layer_norm(interpreter, dtype, bias):
    x, residual, grad, weight, shift = layer_arguments(dtype, (7, 100), bias)
    compare(interpreter, "layer_norm", x, weight, shift, EPS)
    y, total = compare(interpreter, "add_layer_norm", x, residual, weight, shift, EPS)
    # the norm is of the sum as it was rounded, which the tolerances above would not show
    assert torch.equal(y, compare(interpreter, "layer_norm", total, weight, shift, EPS)[0])
    grads = grad, rows(x.shape, dtype, seed=5)
    compare(interpreter, "layer_norm_backward", *grads, total, weight, bias, EPS)
    compare(interpreter, "layer_norm_backward", grad, None, x, weight, bias, EPS)


def test_layer_norm_without_a_weight(interpreter):
    x, residual, grad, *_ = layer_arguments(torch.float32, (7, 100), False)
    compare(interpreter, "add_layer_norm", x, residual, None, None, EPS)
    compare(interpreter, "layer_norm_backward", grad, None, x, None, False, EPS)


@pytest.mark.parametrize("hidden", [n for n in HIDDEN_SIZES if 1 < n <= MAX_CENTERED])
def test_hidden_sizes_of_layer_norm(interpreter, hidden):
    x, residual, grad, weight, bias = layer_arguments(torch.float32, (3, hidden), True)
    compare(interpreter, "add_layer_norm", x, residual, weight, bias, EPS)
    compare(interpreter, "layer_norm_backward", grad, residual, x, weight, True, EPS)


# Less than a tile of rows and of columns; several of both, the last not full.
@dtypes
@pytest.mark.parametrize(("num_rows", "width"), [(1, 5), (128, 64), (300, 100)])
def test_column_sums(interpreter, dtype, num_rows, width):
    partial = rows((num_rows, width), torch.float32)
    target = "ilm_compile.kernels.triton_column_sums:column_sums"
    found = interpreter.call(target, partial, dtype)
    assert found.dtype == dtype
    assert relative_error(found, partial.double().sum(0)) < INTERPRETED[dtype]


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows of a transposed tensor": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dim strided": lambda x: x.mT.contiguous().mT,
    "half of a projection": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every second row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda x: x[:1, :1].expand(x.shape),
    "one number for all": lambda x: x[0, 0, 0].expand(x.shape),
}
every_stride = pytest.mark.parametrize("lay", STRIDES.values(), ids=list(STRIDES))


@every_stride
def test_strides_of_the_norms(interpreter, lay):
    x, residual, grad, weight = norm_arguments(shape=(2, 3, 100))
    compare(interpreter, "add_rms_norm", lay(x), lay(residual), weight, EPS)
    args = lay(grad), lay(x), lay(residual), weight, EPS, False, 0.0
    compare(interpreter, "add_rms_norm_backward", *args)
    compare(interpreter, "add_layer_norm", lay(x), lay(residual), weight, weight, EPS)
    args = lay(grad), lay(x), lay(residual), weight, True, EPS
    compare(interpreter, "layer_norm_backward", *args)


@every_stride
def test_strides_of_glu(interpreter, lay):
    gate, up, grad, _ = norm_arguments(shape=(2, 3, 100))
    compare(interpreter, "glu", lay(gate), lay(up), "gelu")
    compare(interpreter, "glu_backward", lay(grad), lay(gate), lay(up), "gelu")


@dtypes
@activations
@pytest.mark.parametrize("width", [1, 100, 256, 1024, 2500])
def test_glu(interpreter, dtype, width, activation):
    gate, up, grad, _ = norm_arguments(dtype, shape=(3, width))
    compare(interpreter, "glu", gate, up, activation)
    compare(interpreter, "glu_backward", grad, gate, up, activation)


@activations
def test_glu_of_large_gates(interpreter, activation):
    gate = torch.tensor([[-60000.0, -100.0, 0.0, 100.0, 60000.0]])
    ones = torch.ones_like(gate)
    (out,) = compare(interpreter, "glu", gate, ones, activation)
    assert torch.equal(out, gate.relu())
    to_gate, _ = compare(interpreter, "glu_backward", ones, gate, ones, activation)
    assert to_gate.tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0]]


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)], ids=str)
def test_no_rows(interpreter, shape):
    x = torch.zeros(shape)
    weight = torch.ones(64)
    compare(interpreter, "rms_norm", x, weight, EPS)
    _, to_weight = compare(interpreter, "rms_norm_backward", x, x, weight, EPS, False, 0.0)
    assert not to_weight.any()
    compare(interpreter, "add_rms_norm", x, x, weight, EPS)
    compare(interpreter, "add_rms_norm_backward", x, x, x, weight, EPS, False, 0.0)
    compare(interpreter, "add_layer_norm", x, x, weight, weight, EPS)
    compare(interpreter, "layer_norm_backward", x, x, x, weight, True, EPS)
    compare(interpreter, "glu", x, x, "silu")
    compare(interpreter, "glu_backward", x, x, x, "silu")


def arguments_after(target: str, *args: Any) -> tuple[Any, ...]:
    """The arguments of a launcher after the call."""
    module, name = target.split(":")
    getattr(importlib.import_module(module), name)(*args)
    return args


@pytest.mark.parametrize(
    "op", ["rms_norm_backward", "add_rms_norm", "add_rms_norm_backward", "glu_backward"]
)
def test_inputs_are_left_alone(interpreter, op):
    x, residual, grad, weight = norm_arguments()
    tensors = {"rms_norm_backward": (grad, x), "add_rms_norm": (x, residual)}
    args = tensors.get(op, (grad, x, residual))
    args = (*args, "silu") if op == "glu_backward" else (*args, weight, EPS, False, 0.0)
    target = "tests.kernels.test_interpreted:arguments_after"
    after = interpreter.call(target, LAUNCHERS[f"ilm::{op}"], *args)
    for mine, before in zip(after, args, strict=True):
        assert torch.equal(mine, before) if isinstance(before, Tensor) else mine == before


def test_only_what_needs_a_copy_is_copied():
    x = torch.randn(4, 6, 8)
    views = {"half": x[..., :4], "steps": x[:, ::2], "row": x[:1, :1].expand(4, 6, 8)}
    for name, view in views.items():
        shared = flat_rows(view).data_ptr() == view.data_ptr()
        # steps of rows that do not continue over the batch cannot be one stride
        assert shared == (name != "steps") or flat_rows(view).stride(0) == 16
    assert row_stride(flat_rows(x)) is None
    assert row_stride(flat_rows(views["half"])) == 8
    assert row_stride(flat_rows(views["row"])) == 0
    assert flat_rows(x.transpose(1, 2)).stride() == (6, 1)
