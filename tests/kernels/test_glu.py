"""The numbers of ilm::glu on the CPU, beside float64."""

import pytest
import torch
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels import glu
from tests.kernels.accuracy import TOLERANCES, relative_error

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@dtypes
@activations
@pytest.mark.parametrize("shape", [(100,), (7, 100), (2, 3, 64)], ids=str)
def test_output_and_gradients(dtype, shape, activation):
    torch.manual_seed(0)
    inputs = [(4 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = glu(*inputs, activation), ACTIVATIONS[activation](exact[0]) * exact[1]
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCES[dtype]
    grad = torch.randn(shape).to(dtype)
    found = torch.autograd.grad(out, inputs, grad)
    for mine, other in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, other) < TOLERANCES[dtype]


@dtypes
@activations
def test_large_gates_neither_overflow_nor_vanish(dtype, activation):
    gate = torch.tensor([-60000.0, -100.0, 0.0, 100.0, 60000.0]).to(dtype).requires_grad_()
    up = torch.ones(5, dtype=dtype, requires_grad=True)
    out = glu(gate, up, activation)
    assert torch.equal(out, gate.relu())
    to_gate, to_up = torch.autograd.grad(out.sum(), (gate, up))
    assert to_gate.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert torch.equal(to_up, gate.relu())


@activations
def test_rounds_once(activation):
    torch.manual_seed(0)
    gate, up = (torch.randn(64, 64).bfloat16() for _ in range(2))
    exact = ACTIVATIONS[activation](gate.double()) * up.double()
    ours = relative_error(glu(gate, up, activation), exact)
    assert relative_error(ACTIVATIONS[activation](gate) * up, exact) > 1.2 * ours


@activations
def test_gradients_in_float64_are_those_of_torch(activation):
    torch.manual_seed(0)
    inputs = [(4 * torch.randn(50, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    found = torch.autograd.grad(glu(*inputs, activation).sum(), inputs)
    wanted = torch.autograd.grad((ACTIVATIONS[activation](inputs[0]) * inputs[1]).sum(), inputs)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("gate", "up"),
    [
        (torch.zeros(2, 8), torch.zeros(8)),
        (torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16)),
        (torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)),
        (torch.zeros(()), torch.zeros(())),
    ],
    ids=["shapes", "dtypes", "integers", "scalars"],
)
def test_refuses_wrong_inputs(gate, up, device):
    with pytest.raises(IlmCompileError, match=r"expected gate and up .*; got gate \("):
        glu(gate.to(device), up.to(device))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_an_unknown_activation(device):
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(IlmCompileError, match=r"\['silu', 'gelu', 'gelu_tanh'\]; got 'relu'"):
        glu(x, x, "relu")
