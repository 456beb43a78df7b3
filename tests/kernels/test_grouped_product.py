"""The numbers of ilm::grouped_product on the CPU, beside a product for each group in float64."""

import pytest
import torch

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels import grouped_product
from tests.kernels.accuracy import TOLERANCES, relative_error

ENDS = [3, 3, 10, 16]  # the second group has no rows


def products(rows, weights):
    pieces = zip([0, *ENDS], ENDS, weights, strict=False)
    return torch.cat([rows[start:stop] @ weight for start, stop, weight in pieces])


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("widths", [(16, 24), (6, 10)], ids=["whole 16 bytes", "odd"])
@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float64], ids=str)
def test_output_and_gradients(dtype, widths, transposed):
    torch.manual_seed(0)
    rows = torch.randn(16, widths[0]).to(dtype).requires_grad_()
    weights = torch.randn(4, *widths).to(dtype)
    if transposed:
        weights = weights.transpose(1, 2).contiguous().transpose(1, 2)
    weights.requires_grad_()
    out = grouped_product(rows, weights, torch.tensor(ENDS, dtype=torch.int32))
    exact = [x.detach().double().requires_grad_() for x in (rows, weights)]
    expected = products(*exact)
    tolerance = TOLERANCES.get(dtype, 1e-14)
    assert out.dtype == dtype
    assert relative_error(out, expected) < tolerance
    grad = torch.randn(out.shape).to(dtype)
    found = torch.autograd.grad(out, (rows, weights), grad)
    for mine, other in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, other) < tolerance
    assert not found[1][1].any()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("rows", "weights", "offs"),
    [
        (torch.zeros(4, 8), torch.zeros(2, 6, 8), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(4, 8), torch.zeros(2, 8, 8), torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(4, 8), torch.zeros(2, 8, 8).double(), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(4, 8), torch.zeros(2, 8, 8), torch.zeros(2, dtype=torch.int64)),
    ],
    ids=["widths", "groups", "dtypes", "integers"],
)
def test_refuses_wrong_inputs(rows, weights, offs, device):
    with pytest.raises(IlmCompileError, match=r"expected rows .*; got rows \(4, 8\)"):
        grouped_product(rows.to(device), weights.to(device), offs.to(device))


def test_refuses_rows_of_no_group():
    offs = torch.tensor([1, 3], dtype=torch.int32)
    with pytest.raises(IlmCompileError, match="to be the number of rows, 4, got 3"):
        grouped_product(torch.zeros(4, 8), torch.zeros(2, 8, 8), offs)
