"""The op ilm::attention against attention written out in the plainest way."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels import attention, attention_reference, document_starts
from ilm_compile.kernels.last_queries import attend_documents, attend_last_keeping_inputs

BATCH, SEQ, HEADS, HEAD_DIM = 2, 8, 4, 6
BOUNDARIES = {
    "whole rows": None,
    "per row": torch.tensor([[0, 3, 8, 8], [0, 1, 5, 8]], dtype=torch.int32),
    "per row int64": torch.tensor([[0, 8, 8], [0, 4, 8]]),
    "flattened": torch.tensor([0, 3, 8, 13, 16, 16], dtype=torch.int32),
    "flattened across rows": torch.tensor([0, 5, 12, 16]),
    "longer than a row": torch.tensor([0, 3, 13, 16]),
}
boundaries = pytest.mark.parametrize("cu_seqlens", BOUNDARIES.values(), ids=list(BOUNDARIES))
kv_heads = pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=lambda n: f"kv{n}")


def inputs(kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    heads = (HEADS, kv_heads, kv_heads)
    return [torch.randn(BATCH, SEQ, n, HEAD_DIM, dtype=dtype).requires_grad_() for n in heads]


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float | None
) -> Tensor:
    """One softmax for each batch row, head and query, over the keys it may read."""
    batch, seq, heads, head_dim = q.shape
    flattened = cu_seqlens is not None and cu_seqlens.dim() == 1
    if flattened:
        q, k, v = (x.reshape(1, batch * seq, *x.shape[2:]) for x in (q, k, v))
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    rows = []
    for row in range(q.shape[0]):
        bounds = [0] if cu_seqlens is None else cu_seqlens.reshape(q.shape[0], -1)[row].tolist()
        for t in range(q.shape[1]):
            start = max(bound for bound in bounds if bound <= t)
            for head in range(heads):
                group = head // (heads // k.shape[2])
                scores = k[row, start : t + 1, group] @ q[row, t, head] * scale
                rows.append(scores.softmax(0) @ v[row, start : t + 1, group])
    return torch.stack(rows).reshape(batch, seq, heads, head_dim)


@boundaries
@kv_heads
@pytest.mark.parametrize("scale", [None, 0.3], ids=["default scale", "scale 0.3"])
def test_output_and_gradients_equal_plain_attention(cu_seqlens, kv_heads, scale):
    ours, plain = inputs(kv_heads), inputs(kv_heads)
    out = attention(*ours, cu_seqlens, scale)
    expected = plain_attention(*plain, cu_seqlens, scale)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-13)

    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-13)


RUNS = {  # of the queries, on one rank each: start and stop
    "head and tail": [[0, 2, 6, 8], [2, 6]],
    "in the wrong order": [[5, 8, 0, 1], [1, 5]],
    "none together": [[0, 4], [4, 8]],
}
runs = pytest.mark.parametrize("ranks", RUNS.values(), ids=list(RUNS))


def some_queries(q: Tensor, tokens: list[int]) -> Tensor:
    return torch.cat([q[:, a:b] for a, b in zip(tokens[::2], tokens[1::2], strict=True)], 1)


@boundaries
@kv_heads
@runs
def test_runs_of_queries_are_parts_of_the_whole(cu_seqlens, kv_heads, ranks):
    whole, parts = inputs(kv_heads), inputs(kv_heads)
    expected = attention(*whole, cu_seqlens)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    for tokens in ranks:
        out = attention(some_queries(parts[0], tokens), *parts[1:], cu_seqlens, None, tokens)
        torch.testing.assert_close(out, some_queries(expected, tokens), rtol=1e-10, atol=1e-13)
        out.backward(some_queries(grad, tokens))
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-13)


def late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_last_keeping_inputs(q, k, v, scale=None, enable_gqa=False)


def of_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    starts = torch.tensor([[0, 100]], dtype=torch.int32)
    (documents,) = torch.ops.ilm.document_boundaries(starts, 1, 256, [192, 256])
    return attend_documents(q, k, v, documents, scale=None, enable_gqa=False)


@pytest.mark.parametrize("attend", [late, of_documents], ids=["late", "of documents"])
def test_no_mask_is_kept(attend):
    q, k, v = (torch.randn(1, 2, n, 4, requires_grad=True) for n in (64, 256, 256))
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attend(q, k, v)
    inputs_and_boundaries = q.numel() + k.numel() + v.numel() + 6
    assert sum(kept) <= inputs_and_boundaries < 64 * 256


def test_queries_of_other_tokens_than_given_are_refused():
    q, k, v = (x.detach() for x in inputs(2))
    with pytest.raises(IlmCompileError, match=r"the queries of the tokens \[\(0, 3\)\] of 8"):
        attention(q[:, :4], k, v, None, None, [0, 3])


@boundaries
@kv_heads
@pytest.mark.parametrize("chunk", [1, 40, 100, 300], ids=lambda n: f"chunk{n}")
def test_backward_in_chunks(monkeypatch, chunk, cu_seqlens, kv_heads):
    """One query at a time, several of one key head, several key heads."""
    whole, parts = inputs(kv_heads), inputs(kv_heads)
    grad = torch.randn(BATCH, SEQ, HEADS, HEAD_DIM, dtype=torch.float64)
    attention(*whole, cu_seqlens).backward(grad)
    monkeypatch.setattr(attention_reference, "CHUNK", chunk)
    attention(*parts, cu_seqlens).backward(grad)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "two documents"])
def test_backward_never_holds_the_scores_of_a_long_row(monkeypatch, packed):
    largest = 0
    softmax = torch.Tensor.softmax

    def measure(scores, *args):
        nonlocal largest
        largest = max(largest, scores.numel())
        return softmax(scores, *args)

    monkeypatch.setattr(attention_reference, "CHUNK", 2**14)
    monkeypatch.setattr(torch.Tensor, "softmax", measure)
    q, k, v = (torch.randn(1, 512, n, 4, requires_grad=True) for n in (4, 2, 2))
    attention(q, k, v, torch.tensor([[0, 100]]) if packed else None).sum().backward()
    assert 0 < largest <= 2**14


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=["no rows", "no tokens"])
def test_empty_inputs(shape):
    q = torch.zeros(*shape, 2, HEAD_DIM, requires_grad=True)
    attention(q, q, q).sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


@pytest.mark.parametrize(
    ("cu_seqlens", "row"),
    [([[0, 8], [1, 8]], 1), ([[0, 5, 3], [0, 1, 8]], 0), ([[0, 8], [0, 9]], 1), ([0, 17], 0)],
    ids=["not from 0", "falling", "past the row", "past all tokens"],
)
def test_refuses_impossible_boundaries(cu_seqlens, row):
    q, k, v = (x.detach() for x in inputs(2))
    with pytest.raises(IlmCompileError, match=f"cu_seqlens that begin at 0.* in row {row}"):
        attention(q, k, v, torch.tensor(cu_seqlens))


def test_non_contiguous_inputs():
    q, k, v = (x.detach() for x in inputs(2))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out = attention(*strided)
    assert out.is_contiguous()
    torch.testing.assert_close(out, attention(q, k, v), rtol=1e-10, atol=1e-13)
    out.sum().backward()  # an expanded gradient, every stride 0
    assert all(x.grad is not None for x in strided)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)],
    ids=["float32", "bfloat16"],
)
@boundaries
def test_lower_precision(dtype, tolerance, cu_seqlens):
    low = [x.detach().to(dtype).requires_grad_() for x in inputs(2)]
    exact = [x.detach().double().requires_grad_() for x in low]
    out, expected = attention(*low, cu_seqlens), attention(*exact, cu_seqlens)
    assert out.dtype == dtype
    out.sum().backward()
    expected.sum().backward()
    for mine, other in [
        (out, expected),
        *((a.grad, b.grad) for a, b in zip(low, exact, strict=True)),
    ]:
        assert mine.dtype == dtype
        assert (mine - other).norm() <= tolerance * other.norm() + 1e-6


@boundaries
@pytest.mark.parametrize("op", ["attention", "attention_backward"])
def test_opcheck(op, cu_seqlens):
    q, k, v = inputs(2)
    if op == "attention":
        torch.library.opcheck(torch.ops.ilm.attention.default, (q, k, v, cu_seqlens))
    else:
        args = (torch.randn_like(q), q.detach(), k.detach(), v.detach(), cu_seqlens, 0.5, None)
        torch.library.opcheck(torch.ops.ilm.attention_backward.default, args)


def test_symbolic_trace_records_one_node():
    graph = torch.fx.symbolic_trace(lambda q, k, v: torch.ops.ilm.attention.default(q, k, v)).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [
        torch.ops.ilm.attention.default
    ]


def test_meta_tensors():
    q, k, v = (x.detach().to("meta") for x in inputs(2))
    out = attention(q, k, v, torch.zeros(BATCH, 3, dtype=torch.int32, device="meta"))
    assert out.device.type == "meta"
    assert out.shape == q.shape


def test_document_starts():
    starts = document_starts(torch.tensor([[0, 2, 5, 5], [0, 5, 5, 5]], dtype=torch.int32), 5)
    assert starts.tolist() == [[0, 0, 2, 2, 2], [0, 0, 0, 0, 0]]


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


REFUSED = {
    "three dims": (
        (tensor(2, 4, 8), tensor(2, 4, 2, 8), tensor(2, 4, 2, 8), None),
        r"expected q \(batch, seq, heads, head_dim\)",
    ),
    "k and v differ": (
        (tensor(2, 4, 4, 8), tensor(2, 4, 2, 8), tensor(2, 4, 4, 8), None),
        r"k, v \(batch, seq, kv_heads, head_dim\)",
    ),
    "head sizes differ": (
        (tensor(2, 4, 4, 8), tensor(2, 4, 2, 6), tensor(2, 4, 2, 6), None),
        "agree in batch, seq and head_dim",
    ),
    "three heads on two": (
        (tensor(2, 4, 3, 8), tensor(2, 4, 2, 8), tensor(2, 4, 2, 8), None),
        r"multiple of the heads of k; got q \(2, 4, 3, 8\)",
    ),
    "two dtypes": (
        (tensor(2, 4, 2, 8, dtype=torch.float64), tensor(2, 4, 2, 8), tensor(2, 4, 2, 8), None),
        "of one dtype",
    ),
    "float boundaries": (
        (*(tensor(2, 4, 2, 8) for _ in range(3)), tensor(2, 3)),
        "cu_seqlens of int32 or int64",
    ),
    "boundaries of another batch": (
        (*(tensor(2, 4, 2, 8) for _ in range(3)), tensor(3, 3, dtype=torch.int32)),
        r"cu_seqlens \(batch, n\)",
    ),
}


@pytest.mark.parametrize(("args", "message"), REFUSED.values(), ids=list(REFUSED))
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_wrong_inputs(args, message, device):
    args = [x if x is None else x.to(device) for x in args]
    with pytest.raises(IlmCompileError, match=message):
        attention(*args)


def squared_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A loss whose gradient needs the attention's result."""
    return attention(q, k, v).square().sum()


def test_compile():
    ours, plain = inputs(2), inputs(2)
    compiled = torch.compile(squared_attention, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(*ours), ours)
    expected = torch.autograd.grad(squared_attention(*plain), plain)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("save", [True, False], ids=["saved", "recomputed"])
def test_selective_checkpointing(monkeypatch, save):
    runs = []
    forward = attention_reference.forward
    monkeypatch.setattr(
        attention_reference, "forward", lambda *args: runs.append(1) or forward(*args)
    )

    def policy(ctx, op, *args, **kwargs):
        is_saved = save and op is torch.ops.ilm.attention.default
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    ours, plain = inputs(2), inputs(2)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(squared_attention, *ours, use_reentrant=False, context_fn=contexts)
    found = torch.autograd.grad(out, ours)
    assert len(runs) == (1 if save else 2)
    expected = torch.autograd.grad(squared_attention(*plain), plain)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_autocast_does_not_reach_into_the_op() -> None:
    """Forward and backward inside autocast compute in the dtype of their inputs."""
    results = []
    for enabled in (False, True):
        tensors = inputs(2, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = attention(*tensors)
            grads = torch.autograd.grad(out.square().sum(), tensors)
        results.append((out, *grads))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)
