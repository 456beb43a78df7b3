"""The Triton launchers of rotary and qkv_rotary in the interpreter, beside the references."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import INTERPRETED, relative_error
from tests.kernels.worker import Worker

ilm = torch.ops.ilm
BATCH, SEQ = 2, 5
layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def compare(interpreter: Worker, op: str, *args: Any) -> None:
    """Hold what the launcher of `ilm::op` gives in the interpreter to the reference."""
    module = f"triton_{op.removesuffix('_backward')}"
    found = interpreter.call(f"ilm_compile.kernels.{module}:{op}", *args)
    expected = getattr(ilm, op)(*args)
    if isinstance(found, Tensor):
        found, expected = (found,), (expected,)
    for mine, other in zip(found, expected, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert mine.is_contiguous()
        assert relative_error(mine, other) < INTERPRETED[mine.dtype]


def heads(num_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, SEQ, num_heads, dim).to(dtype)


def angles(pairs: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    found = torch.rand(rows, SEQ, pairs) * 6
    return found.cos(), found.sin()


def compare_all(
    interpreter: Worker, q: Tensor, k: Tensor, qkv: Tensor, *tables: Any, backward: bool = True
) -> None:
    """Both ops, forward and backward, on the same angles."""
    q_like = qkv[:, :, :, :-2].flatten(2, 3)
    compare(interpreter, "rotary", q, k, *tables)
    compare(interpreter, "qkv_rotary", qkv, *tables)
    compare(interpreter, "rotary_backward", q, k, *tables)
    compare(interpreter, "qkv_rotary_backward", q_like, qkv[:, :, :, 0], qkv[:, :, :, 1], *tables)


@layouts
@pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
def test_dtypes(interpreter, dtype, interleaved) -> None:
    torch.manual_seed(0)
    q, k, qkv = heads(3, 8, dtype), heads(2, 8, dtype), heads(8, 8, dtype).unflatten(2, (2, 4))
    compare_all(interpreter, q, k, qkv, *angles(4), None, interleaved)


# All, none, some and a width that is no power of two; one number left over, more than the pairs.
@layouts
@pytest.mark.parametrize(
    ("pairs", "dim"), [(4, 8), (0, 4), (3, 8), (5, 10), (3, 7), (2, 20), (64, 128)]
)
def test_pairs(interpreter, pairs, dim, interleaved) -> None:
    torch.manual_seed(0)
    qkv = heads(8, dim).unflatten(2, (2, 4))
    compare_all(interpreter, heads(3, dim), heads(2, dim), qkv, *angles(pairs), None, interleaved)


# One head of each; heads that share a tile with those of k; more than a tile; one group; no groups.
@pytest.mark.parametrize(
    ("q_heads", "kv_heads"), [(1, 1), (3, 1), (12, 12), (8, 2), (20, 4)], ids=str
)
def test_head_counts(interpreter, q_heads, kv_heads) -> None:
    torch.manual_seed(0)
    qkv = heads(q_heads + 2 * kv_heads, 8).unflatten(2, (kv_heads, -1))
    compare_all(interpreter, heads(q_heads, 8), heads(kv_heads, 8), qkv, *angles(4), None, False)


@layouts
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rows", [1, BATCH])
def test_positions(interpreter, rows, dtype, interleaved) -> None:
    torch.manual_seed(0)
    table = torch.rand(9, 4) * 6
    positions = torch.randint(0, 9, (rows, SEQ)).to(dtype)
    qkv = heads(8, 8).unflatten(2, (2, 4))
    tables = table.cos(), table.sin(), positions, interleaved
    compare_all(interpreter, heads(3, 8), heads(2, 8), qkv, *tables)


def test_angles_of_each_row_and_of_any_strides(interpreter) -> None:
    torch.manual_seed(0)
    qkv = heads(8, 8).unflatten(2, (2, 4))
    cos, sin = angles(8, rows=BATCH)  # as Hugging Face has them: twice as wide, the halves alike
    for tables in (
        (cos[..., :4], sin[..., :4]),
        (cos[..., :4], sin[..., :4].contiguous()),
        (cos[..., ::2], sin[..., ::2]),
        (cos[:1, :1, :4].expand(1, SEQ, 4), sin[:1, :1, :4].expand(1, SEQ, 4)),
    ):
        compare_all(interpreter, heads(3, 8), heads(2, 8), qkv, *tables, None, False)
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    table = cos[0, :, :4], sin[0, :, :4]
    compare_all(interpreter, heads(3, 8), heads(2, 8), qkv, *table, positions, False)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "heads before tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens before rows": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dim strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "part of a projection": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "one head for all": lambda x: x[:, :, :1].expand(x.shape),
    "one number for all": lambda x: x.flatten()[0].expand(x.shape),
}


@pytest.mark.parametrize("lay", STRIDES.values(), ids=list(STRIDES))
def test_strides(interpreter, lay) -> None:
    torch.manual_seed(0)
    q, k = lay(heads(3, 8)), lay(heads(2, 8))
    compare(interpreter, "rotary", q, k, *angles(4))
    compare(interpreter, "rotary_backward", q, k, *angles(4), None, False)
    compare(interpreter, "qkv_rotary", lay(heads(4, 8)).unsqueeze(2), *angles(4))
    compare(interpreter, "qkv_rotary_backward", lay(heads(4, 8)), k, k, *angles(4), None, False)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (0, 4), (2, 0)], ids=str)
def test_numbers_of_tokens(interpreter, shape) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(*shape, 3, 32), torch.randn(*shape, 1, 32)
    table = torch.rand(1, shape[1], 16)
    compare(interpreter, "rotary", q, k, table.cos(), table.sin())
    compare(interpreter, "qkv_rotary", q.unsqueeze(2), table.cos(), table.sin())
    compare(interpreter, "qkv_rotary_backward", q, k, k, table, table, None, True)


@pytest.mark.parametrize("position", [-1, 9, 2**40])
def test_a_position_outside_the_table_makes_nan(interpreter, position) -> None:
    q, table = torch.ones(1, 2, 1, 10), torch.ones(9, 4)
    positions = torch.tensor([[0, position]])
    target = "ilm_compile.kernels.triton_rotary:rotary"
    for x in interpreter.call(target, q, q, table, table, positions, False):
        assert not x[:, 0].isnan().any()
        assert x[:, 1, :, :8].isnan().all()


def test_values_pass_unchanged_beside_infinite_numbers(interpreter) -> None:
    qkv = torch.randn(1, SEQ, 1, 3, 8)
    qkv[:, :, :, 2, 0] = torch.inf
    target = "ilm_compile.kernels.triton_qkv_rotary:qkv_rotary"
    *_, v = interpreter.call(target, qkv, *angles(4), None, False)
    assert torch.equal(v, qkv[:, :, :, 2])
