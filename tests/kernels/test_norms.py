"""The numbers of ilm::rms_norm and ilm::add_rms_norm on the CPU, beside float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels import MAX_HIDDEN, add_rms_norm, rms_norm
from tests.kernels.accuracy import TOLERANCES, relative_error

EPS = 1e-5
ROWS = 7
DTYPES = list(TOLERANCES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
weights = pytest.mark.parametrize("weight_dtype", [None, torch.float32, "like x"])
offsets = pytest.mark.parametrize("offset", [0.0, 1.0])
hidden_sizes = pytest.mark.parametrize("hidden", [3, 64, 768])


def rows(hidden: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of very different size: eps matters in the first and not in the last."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 2, ROWS)[:, None]
    return (torch.randn(ROWS, hidden, generator=generator) * sizes).to(dtype)


def make_weight(hidden: int, weight_dtype, x: Tensor) -> Tensor | None:
    if weight_dtype is None:
        return None
    generator = torch.Generator().manual_seed(9)
    found = torch.rand(hidden, generator=generator) + 0.5
    return found.to(x.dtype if weight_dtype == "like x" else weight_dtype)


def exactly(x: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    """The norm in float64, by torch."""
    scale = None if weight is None else weight.double() + offset
    return F.rms_norm(x.double(), x.shape[-1:], scale, EPS)


@dtypes
@weights
@hidden_sizes
def test_output_and_gradients_of_rms_norm(dtype, weight_dtype, hidden):
    x, grad = rows(hidden, dtype), rows(hidden, dtype, seed=1)
    weight = make_weight(hidden, weight_dtype, x)
    inputs = [t.requires_grad_() for t in (x, weight) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in inputs]

    out = rms_norm(x, weight, EPS)
    expected = exactly(exact[0], exact[1] if weight is not None else None, 0.0)
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCES[dtype]
    found = torch.autograd.grad(out, inputs, grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for mine, other, leaf in zip(found, wanted, inputs, strict=True):
        assert mine.dtype == leaf.dtype
        assert relative_error(mine, other) < TOLERANCES[dtype]


@dtypes
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_eps(dtype, eps):
    x = torch.full((1, 64), 1e-2, dtype=dtype)
    expected = x.double() / (x.double().square().mean() + eps).sqrt()
    assert relative_error(rms_norm(x, None, eps), expected) < TOLERANCES[dtype]


def test_offset_is_added_to_the_weight_before_rounding():
    # Gemma keeps weight - 1, of which bf16 holds more digits than of the weight.
    x = rows(64, torch.bfloat16)
    weight = torch.full((64,), 2**-9, dtype=torch.bfloat16)
    assert 1 + weight.float()[0] != (1 + weight)[0]
    expected = exactly(x, weight, 1.0)
    assert torch.equal(rms_norm(x, weight, EPS, weight_offset=1.0), expected.bfloat16())


@dtypes
@pytest.mark.parametrize("weight_dtype", ["like x", torch.float32])
def test_cast_before_scale_is_hugging_faces_llama_bit_for_bit(dtype, weight_dtype):
    x = rows(768, dtype)
    weight = make_weight(768, weight_dtype, x)
    # transformers, models/llama/modeling_llama.py, LlamaRMSNorm.forward
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    expected = (weight * unit.to(dtype)).to(dtype)
    assert torch.equal(rms_norm(x, weight, EPS, cast_before_scale=True), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cast_before_scale_rounds_twice(dtype):
    x = rows(768, dtype)
    weight = make_weight(768, "like x", x)
    twice, once = (rms_norm(x, weight, EPS, cast) for cast in (True, False))
    expected = exactly(x, weight, 0.0)
    assert relative_error(twice, expected) > 1.2 * relative_error(once, expected)


def test_the_gradient_of_the_weight_sees_the_rounded_value():
    x = rows(64, torch.bfloat16)
    weight = make_weight(64, torch.float32, x).requires_grad_()
    unit = rms_norm(x, None, EPS)
    (found,) = torch.autograd.grad(rms_norm(x, weight, EPS, True).sum(), weight)
    torch.testing.assert_close(found, unit.float().sum(0))


MIXES = [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("dtype", "stream"), MIXES, ids=str)
@offsets
def test_add_rms_norm(dtype, stream, offset):
    x, residual = rows(100, dtype), rows(100, stream, seed=1)
    weight = make_weight(100, torch.float32, x)
    inputs = [t.requires_grad_() for t in (x, residual, weight)]
    y, total = add_rms_norm(x, residual, weight, EPS, weight_offset=offset)
    assert (y.dtype, total.dtype) == (dtype, stream)
    assert torch.equal(total, (x.to(stream) + residual))
    if dtype == stream:  # the norm is of the sum as it was rounded
        assert torch.equal(y, rms_norm(total, weight, EPS, weight_offset=offset))
    assert relative_error(y, exactly(total, weight, offset)) < TOLERANCES[dtype]

    grads = rows(100, dtype, seed=2), rows(100, stream, seed=3)
    found = torch.autograd.grad((y, total), inputs, grads)
    # The sum as it was rounded, so that only the norm's own errors are left to see.
    leaf, scale = total.detach().double().requires_grad_(), weight.detach().double()
    scale.requires_grad_()
    along, to_weight = torch.autograd.grad(
        exactly(leaf, scale, offset), (leaf, scale), grads[0].double()
    )
    wanted = (along + grads[1].double(),) * 2 + (to_weight,)
    for mine, other, leaf in zip(found, wanted, inputs, strict=True):
        assert mine.dtype == leaf.dtype
        assert relative_error(mine, other) < TOLERANCES[dtype]


@pytest.mark.parametrize("used", [0, 1], ids=["norm only", "sum only"])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=str)
def test_one_output_unused(used, stream):
    x, residual = rows(64, torch.bfloat16), rows(64, stream, seed=1)
    weight = make_weight(64, torch.float32, x)
    inputs = [t.requires_grad_() for t in (x, residual, weight)]
    outputs = add_rms_norm(x, residual, weight, EPS)
    grads = [torch.zeros_like(out) for out in outputs]
    grads[used] = rows(64, outputs[used].dtype, seed=2)
    expected = torch.autograd.grad(outputs, inputs, grads, retain_graph=True)
    found = torch.autograd.grad(outputs[used], inputs, grads[used], allow_unused=True)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(torch.zeros_like(other) if mine is None else mine, other)


def test_float64_stays_float64():
    x, residual = rows(100, torch.float64), rows(100, torch.float64, seed=1)
    weight = make_weight(100, torch.float32, x)
    assert relative_error(rms_norm(x, weight, EPS), exactly(x, weight, 0.0)) < 1e-15
    y, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert relative_error(y, exactly(total, weight, 0.0)) < 1e-15


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BF16 = torch.bfloat16
REFUSED = {
    "a scalar": (rms_norm, (empty(), None, EPS), r"expected x \(\.\.\., hidden\)"),
    "integers": (rms_norm, (empty(2, 8, dtype=torch.int64), None, EPS), "of a floating dtype"),
    "too wide": (
        rms_norm,
        (empty(1, MAX_HIDDEN + 1), None, EPS),
        r"a hidden size of 1 to 16384 .*got x \(1, 16385\)",
    ),
    "no width": (rms_norm, (empty(4, 0), None, EPS), "a hidden size of 1 to 16384"),
    "weight of another size": (
        rms_norm,
        (empty(2, 8), empty(4), EPS),
        r"a weight of shape \(8,\); got x \(2, 8\) torch.float32, weight \(4,\)",
    ),
    "weight of another dtype": (
        rms_norm,
        (empty(2, 8), empty(8, dtype=BF16), EPS),
        "a weight of torch.float32 or torch.float32; got",
    ),
    "an offset of nothing": (
        rms_norm,
        (empty(2, 8), None, EPS, False, 1.0),
        "a weight, as weight_offset is 1.0",
    ),
    "residual of another shape": (
        add_rms_norm,
        (empty(2, 8), empty(1, 8), None, EPS),
        r"a residual of x's shape.*residual \(1, 8\)",
    ),
    "residual of fewer digits": (
        add_rms_norm,
        (empty(2, 8), empty(2, 8, dtype=BF16), None, EPS),
        r"in the dtype of x or torch.float32; got",
    ),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("function", "args", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refuses_wrong_inputs(function, args, message, device):
    args = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]
    with pytest.raises(IlmCompileError, match=message):
        function(*args)
