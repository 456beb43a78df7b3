"""The numbers of ilm::layer_norm and ilm::add_layer_norm on the CPU, beside float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels import MAX_CENTERED, add_layer_norm, layer_norm
from tests.kernels.accuracy import TOLERANCES, relative_error
from tests.kernels.test_norms import EPS, rows

dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
scales = pytest.mark.parametrize("kept", [0, 1, 2], ids=["plain", "weight", "weight and bias"])


def scale(hidden: int, kept: int, dtype: torch.dtype) -> list[Tensor | None]:
    """A weight and a bias, of which `kept` are there."""
    found = [torch.linspace(0.5, 1.5, hidden), torch.linspace(-1.0, 1.0, hidden)]
    return [t.to(dtype) if i < kept else None for i, t in enumerate(found)]


@dtypes
@scales
@pytest.mark.parametrize("hidden", [3, 64, 768])
def test_output_and_gradients(dtype, kept, hidden):
    x, grad = rows(hidden, dtype), rows(hidden, dtype, seed=1)
    scaled = scale(hidden, kept, torch.float32)
    inputs = [t.requires_grad_() for t in (x, *scaled) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out = layer_norm(x, *scaled, EPS)
    expected = F.layer_norm(exact[0], (hidden,), *exact[1:], eps=EPS)
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCES[dtype]
    found = torch.autograd.grad(out, inputs, grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for mine, other, leaf in zip(found, wanted, inputs, strict=True):
        assert mine.dtype == leaf.dtype
        assert relative_error(mine, other) < 2 * TOLERANCES[dtype]


@dtypes
@scales
def test_add_layer_norm(dtype, kept):
    x, residual = rows(100, dtype), rows(100, dtype, seed=1)
    scaled = scale(100, kept, dtype)
    inputs = [t.requires_grad_() for t in (x, residual, *scaled) if t is not None]
    y, total = add_layer_norm(x, residual, *scaled, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, layer_norm(total, *scaled, EPS))
    grads = rows(100, dtype, seed=2), rows(100, dtype, seed=3)
    found = torch.autograd.grad((y, total), inputs, grads)
    exact = [t.detach().double().requires_grad_() for t in (total, *inputs[2:])]
    along, *others = torch.autograd.grad(
        F.layer_norm(exact[0], (100,), *exact[1:], eps=EPS), exact, grads[0].double()
    )
    wanted = (along + grads[1].double(),) * 2 + tuple(others)
    for mine, other in zip(found, wanted, strict=True):
        assert relative_error(mine, other) < 2 * TOLERANCES[dtype]


def test_float64_is_torchs():
    x, residual = (rows(100, torch.float64, seed=n).requires_grad_() for n in range(2))
    scaled = [t.requires_grad_() for t in scale(100, 2, torch.float64)]
    y, total = add_layer_norm(x, residual, *scaled, EPS)
    expected = F.layer_norm(x + residual, (100,), *scaled, EPS)
    found, wanted = (
        torch.autograd.grad((out * total).sum(), (x, residual, *scaled), retain_graph=True)
        for out in (y, expected)
    )
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [0, 1], ids=["norm only", "sum only"])
def test_one_output_unused(used):
    inputs = [t.requires_grad_() for t in (rows(64, torch.float32), rows(64, torch.float32, 1))]
    inputs += [t.requires_grad_() for t in scale(64, 2, torch.float32)]
    outputs = add_layer_norm(*inputs, EPS)
    grads = [torch.zeros_like(out) for out in outputs]
    grads[used] = rows(64, torch.float32, seed=2)
    expected = torch.autograd.grad(outputs, inputs, grads, retain_graph=True)
    found = torch.autograd.grad(outputs[used], inputs, grads[used], allow_unused=True)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(torch.zeros_like(other) if mine is None else mine, other)


ZEROS, BF16 = torch.zeros, torch.bfloat16
REFUSED = {
    "too wide": ((ZEROS(1, MAX_CENTERED + 1), None, None, EPS), "a hidden size of 1 to 8192"),
    "bias alone": ((ZEROS(2, 8), None, ZEROS(8), EPS), "a bias like the weight; got no weight"),
    "bias of another dtype": (
        (ZEROS(2, 8, dtype=BF16), ZEROS(8), ZEROS(8, dtype=BF16), EPS),
        r"got weight \(8,\) torch.float32, bias \(8,\) torch.bfloat16",
    ),
    "residual of another dtype": (
        (ZEROS(2, 8, dtype=BF16), ZEROS(2, 8), None, None, EPS),
        r"expected a residual like x; .*residual \(2, 8\) torch.float32",
    ),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("args", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refuses_wrong_inputs(args, message, device):
    args = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]
    with pytest.raises(IlmCompileError, match=message):
        (add_layer_norm if len(args) == 5 else layer_norm)(*args)
