"""The ops ilm::rotary and ilm::qkv_rotary against complex multiplication, in torch alone."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels import qkv_rotary, rotary
from ilm_compile.models.rotary import rotary_tables, rotate

BATCH, SEQ, HEADS, KV_HEADS, HEAD_DIM = 2, 5, 4, 2, 8
layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
pairs = pytest.mark.parametrize("pairs", [4, 3, 0], ids=["all", "partial", "none"])


def tables(rows: int, pairs: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angles = torch.rand(rows, SEQ, pairs, dtype=torch.float64) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The definition: pair (a, b) as a + ib times cos + i sin; x (B, S, ..., D), float64."""
    width = cos.shape[-1]
    head, rest = x[..., : 2 * width], x[..., 2 * width :]
    split = head.unflatten(-1, (width, 2) if interleaved else (2, width))
    a, b = split.unbind(-1 if interleaved else -2)
    factor = torch.complex(cos, sin)
    factor = factor.reshape(*cos.shape[:2], *(1,) * (x.dim() - 3), width)
    product = torch.complex(a, b) * factor
    joined = torch.stack((product.real, product.imag), -1 if interleaved else -2).flatten(-2)
    return torch.cat((joined, rest), -1)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@layouts
@pairs
@pytest.mark.parametrize("rows", [1, BATCH], ids=["shared angles", "angles of each row"])
def test_rotary_and_its_gradients(interleaved: bool, pairs: int, rows: int) -> None:
    torch.manual_seed(0)
    shapes = (BATCH, SEQ, HEADS, HEAD_DIM), (BATCH, SEQ, KV_HEADS, HEAD_DIM)
    q, k = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    cos, sin = tables(rows, pairs)
    ours = rotary(q, k, cos, sin, None, interleaved)
    plain = [turned(x, cos, sin, interleaved) for x in (q, k)]
    grads = [torch.randn_like(x) for x in ours]
    for mine, other in zip(ours, plain, strict=True):
        assert mine.is_contiguous()
        close(mine, other)
    mine, other = (torch.autograd.grad(out, (q, k), grads) for out in (ours, plain))
    close(mine[0], other[0])
    close(mine[1], other[1])


@layouts
@pairs
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("q_per_kv", [1, 3])
def test_qkv_rotary_and_its_gradient(
    interleaved: bool, pairs: int, kv_heads: int, q_per_kv: int
) -> None:
    torch.manual_seed(0)
    shape = (BATCH, SEQ, kv_heads, q_per_kv + 2, HEAD_DIM)
    qkv = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(1, pairs)
    ours = qkv_rotary(qkv, cos, sin, None, interleaved)
    plain = (
        turned(qkv[:, :, :, :-2], cos, sin, interleaved).flatten(2, 3),
        turned(qkv[:, :, :, -2], cos, sin, interleaved),
        qkv[:, :, :, -1],
    )
    grads = [torch.randn_like(x) for x in ours]
    for mine, other in zip(ours, plain, strict=True):
        assert mine.is_contiguous()
        close(mine, other)
    mine, other = (torch.autograd.grad(out, qkv, grads) for out in (ours, plain))
    close(mine[0], other[0])


def test_halves_are_what_the_models_do() -> None:
    positions = torch.arange(SEQ).unsqueeze(0)
    cos, sin = rotary_tables(positions, head_dim=HEAD_DIM, base=1e4, dtype=torch.float32)
    q, k = torch.randn(BATCH, SEQ, HEADS, HEAD_DIM), torch.randn(BATCH, SEQ, 1, HEAD_DIM)
    for mine, other in zip(rotary(q, k, cos[:, :, 0], sin[:, :, 0]), (q, k), strict=True):
        assert torch.equal(mine, rotate(other, cos, sin))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [1, BATCH])
def test_positions_pick_rows_of_a_table(dtype: torch.dtype, rows: int) -> None:
    angles = torch.rand(9, 4)
    positions = torch.randint(0, 9, (rows, SEQ), dtype=dtype)
    qkv = torch.randn(BATCH, SEQ, 2, 4, HEAD_DIM)
    q, k = qkv[:, :, :, 0], qkv[:, :, :, 1]
    cos, sin = angles.cos(), angles.sin()
    picked = cos[positions], sin[positions]
    for mine, other in (
        (rotary(q, k, cos, sin, positions), rotary(q, k, *picked)),
        (qkv_rotary(qkv, cos, sin, positions), qkv_rotary(qkv, *picked)),
    ):
        assert all(map(torch.equal, mine, other))


@pytest.mark.parametrize("position", [-1, 9])
def test_a_position_outside_the_table_raises(position: int) -> None:
    q, table = torch.zeros(1, 1, 1, HEAD_DIM), torch.zeros(9, 4)
    with pytest.raises(IndexError):
        rotary(q, q, table, table, torch.full((1, 1), position))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    q, k = (torch.randn(BATCH, SEQ, 2, HEAD_DIM).to(dtype) for _ in range(2))
    cos, sin = tables(1, 4, torch.float32)
    exact = rotary(q.float(), k.float(), cos, sin)
    for mine, other in zip(rotary(q, k, cos, sin), exact, strict=True):
        assert torch.equal(mine, other.to(dtype))


def strided(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "transposed", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "sliced", torch.cat((x, x), -1)[..., : x.shape[-1]]
    yield "last dim apart", torch.stack((x, x), -1)[..., 0]


def test_inputs_and_gradients_of_any_strides() -> None:
    x = torch.randn(BATCH, SEQ, 3, HEAD_DIM)
    cos, sin = tables(1, 4, torch.float32)
    expected = rotary(x, x, cos, sin)
    packed = qkv_rotary(x.unsqueeze(2), cos, sin)
    for name, view in strided(x):
        assert all(map(torch.equal, rotary(view, view, cos, sin), expected)), name
        assert all(map(torch.equal, qkv_rotary(view.unsqueeze(2), cos, sin), packed)), name
    x.requires_grad_()
    (grad,) = torch.autograd.grad(rotary(x, x, cos, sin)[0].sum(), x)  # expanded: strides of 0
    (other,) = torch.autograd.grad(turned(x, cos, sin, False).sum(), x)
    torch.testing.assert_close(grad, other)


def test_one_head_is_not_an_alias() -> None:
    qkv = torch.randn(1, 1, 1, 3, HEAD_DIM)
    before = qkv.clone()
    nothing = torch.zeros(1, 1, 0)  # no pair: every number is copied
    for part in (
        *qkv_rotary(qkv, nothing, nothing),
        *rotary(qkv[:, :, 0], qkv[:, :, 0], nothing, nothing),
    ):
        part.zero_()
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("kind", ["rows", "positions"])
@pytest.mark.parametrize("op", ["rotary", "rotary_backward", "qkv_rotary", "qkv_rotary_backward"])
def test_opcheck(op: str, kind: str) -> None:
    q, k = torch.randn(BATCH, SEQ, HEADS, HEAD_DIM), torch.randn(BATCH, SEQ, KV_HEADS, HEAD_DIM)
    cos, sin = tables(1, 4, torch.float32)
    positions = torch.arange(SEQ).unsqueeze(0) if kind == "positions" else None
    angles = (cos, sin, None) if positions is None else (cos[0], sin[0], positions)
    qkv = torch.randn(BATCH, SEQ, KV_HEADS, 4, HEAD_DIM)
    given = {
        "rotary": (q.requires_grad_(), k.requires_grad_()),
        "rotary_backward": (q.detach(), k.detach()),
        "qkv_rotary": (qkv.requires_grad_(),),
        "qkv_rotary_backward": (q.detach(), k.detach(), k.detach()),
    }
    target = getattr(torch.ops.ilm, op).default
    torch.library.opcheck(target, (*given[op], *angles, True))


class Turn(torch.nn.Module):
    """Both ops, on what export and compile give them."""

    def forward(self, qkv: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        cos, sin = table.cos(), table.sin()
        q, k, v = qkv_rotary(qkv, cos, sin, positions)
        q, k = rotary(q, k, cos, sin, positions, True)
        return (q.sum(2) * k.sum(2) + v.sum(2)).square().sum()


def example() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    qkv = torch.randn(BATCH, SEQ, 2, 4, HEAD_DIM, requires_grad=True)
    return qkv, torch.randn(9, 4), torch.randint(0, 9, (BATCH, SEQ))


def test_export_with_dynamic_batch_and_length() -> None:
    qkv, table, positions = example()
    batch, seq = torch.export.Dim("batch", min=2), torch.export.Dim("seq", min=2)
    shapes = ({0: batch, 1: seq}, None, {0: batch, 1: seq})
    program = torch.export.export(Turn(), (qkv, table, positions), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert [name for name in targets if "ilm" in name] == [
        "ilm.qkv_rotary.default",
        "ilm.rotary.default",
    ]
    longer = torch.randn(3, 7, 2, 4, HEAD_DIM), table, torch.randint(0, 9, (3, 7))
    torch.testing.assert_close(program.module()(*longer), Turn()(*longer))


def test_compile() -> None:
    qkv, table, positions = example()
    expected = torch.autograd.grad(Turn()(qkv, table, positions), qkv)
    compiled = torch.compile(Turn(), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(qkv, table, positions), qkv)
    torch.testing.assert_close(found, expected)


class Count(TorchDispatchMode):
    """Counts the ops of this package that run."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ilm":
            self.runs.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("save", [True, False], ids=["saved", "recomputed"])
def test_selective_checkpointing(save: bool) -> None:
    qkv, table, positions = example()
    expected = torch.autograd.grad(Turn()(qkv, table, positions), qkv)
    rotations = [torch.ops.ilm.qkv_rotary.default, torch.ops.ilm.rotary.default]

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = save and op in rotations
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(Turn(), qkv, table, positions, use_reentrant=False, context_fn=contexts)
    with Count() as count:
        torch.testing.assert_close(torch.autograd.grad(out, qkv), expected)
    backward = ["ilm.rotary_backward.default", "ilm.qkv_rotary_backward.default"]
    assert count.runs == ([] if save else [str(op) for op in rotations]) + backward


def test_meta_tensors() -> None:
    q, k = (torch.empty(2, 3, n, 6, device="meta", dtype=torch.bfloat16) for n in (4, 1))
    table = torch.empty(1, 3, 2, device="meta")
    outs = rotary(q, k, table, table)
    assert [(x.shape, x.dtype, x.device.type) for x in outs] == [
        (x.shape, x.dtype, "meta") for x in (q, k)
    ]
    parts = qkv_rotary(torch.empty(2, 3, 1, 6, 6, device="meta"), table, table)
    assert [tuple(x.shape) for x in parts] == [(2, 3, 4, 6), (2, 3, 1, 6), (2, 3, 1, 6)]


def test_empty_inputs() -> None:
    table = torch.zeros(1, 0, 4)
    parts = qkv_rotary(torch.zeros(2, 0, 1, 3, HEAD_DIM), table, table)
    assert [tuple(x.shape) for x in parts] == [(2, 0, 1, HEAD_DIM)] * 3


def test_tables_that_ask_for_a_gradient_are_refused() -> None:
    q, table = torch.zeros(1, 3, 4, HEAD_DIM, requires_grad=True), torch.zeros(1, 3, 4)
    needy = table.clone().requires_grad_()
    for call in (
        lambda: rotary(q, q, needy, table),
        lambda: qkv_rotary(q[:, :, None], table, needy),
    ):
        with pytest.raises(IlmCompileError, match="cos and sin that need no gradient"):
            call()


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


Q, TABLE = zeros(2, 3, 4, 8), zeros(1, 3, 4)
REFUSED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "three dims": (rotary, (zeros(2, 3, 8), Q, TABLE, TABLE), r"expected q \(batch, seq, heads"),
    "head sizes": (rotary, (Q, zeros(2, 3, 4, 6), TABLE, TABLE), r"got q \(2, 3, 4, 8\)"),
    "two dtypes": (rotary, (Q, Q.double(), TABLE, TABLE), "q and k of one dtype"),
    "two tables": (rotary, (Q, Q, TABLE, TABLE[..., :2]), "cos and sin of one shape"),
    "integers": (rotary, (Q, Q, TABLE.int(), TABLE.int()), "floating point"),
    "too many pairs": (rotary, (Q, Q, zeros(1, 3, 5), zeros(1, 3, 5)), "head_dim / 2 pairs"),
    "other length": (rotary, (Q, Q, zeros(1, 2, 4), zeros(1, 2, 4)), "angles for each token"),
    "other batch": (rotary, (Q, Q, zeros(3, 3, 4), zeros(3, 3, 4)), "angles for each token"),
    "rows with positions": (
        rotary,
        (Q, Q, TABLE, TABLE, zeros(1, 3).int()),
        r"\(positions, pairs\)",
    ),
    "float positions": (rotary, (Q, Q, TABLE[0], TABLE[0], zeros(1, 3)), "int32 or int64"),
    "flat positions": (rotary, (Q, Q, TABLE[0], TABLE[0], zeros(3).int()), "position_ids"),
    "unpacked": (qkv_rotary, (Q, TABLE, TABLE), r"q_per_kv \+ 2, head_dim\); got \(2, 3, 4, 8\)"),
    "no query": (qkv_rotary, (zeros(2, 3, 1, 2, 8), TABLE, TABLE), "q_per_kv"),
    "packed, other length": (qkv_rotary, (Q[:, :, None], zeros(1, 2, 4), zeros(1, 2, 4)), "angles"),
}


@pytest.mark.parametrize(("op", "args", "message"), REFUSED.values(), ids=list(REFUSED))
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_wrong_inputs(op, args, message, device) -> None:
    with pytest.raises(IlmCompileError, match=message):
        op(*(x.to(device) for x in args))
