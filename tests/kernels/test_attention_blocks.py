"""Blocks of attention, put together, are attention over all of their keys."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from ilm_compile.kernels import attention_blocks as blocks

QUERIES, KEYS = 5, (3, 4, 6)  # of one block, of each block
SHAPES = {"as many heads": (4, 4, 8), "groups": (4, 2, 8), "other values": (4, 2, 6)}
MASKS = ("none", "some keys", "no key", "bias", "one row")


def inputs(heads: int, kv_heads: int, width: int, dtype=torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, heads, QUERIES, 8, dtype=dtype)
    k, v = (torch.randn(2, kv_heads, sum(KEYS), n, dtype=dtype) for n in (8, width))
    return [x.requires_grad_() for x in (q, k, v)]


def make_mask(kind: str) -> Tensor | None:
    shown = torch.rand(2, 1, QUERIES, sum(KEYS), generator=torch.Generator().manual_seed(1)) < 0.7
    if kind == "no key":  # for one query in a block, and for one anywhere
        shown[:, :, 1, : KEYS[0]] = False
        shown[0, :, 2] = False
    found = {
        "bias": torch.randn(4, QUERIES, sum(KEYS), dtype=torch.float64),
        "one row": shown[:, :, :1],
    }
    return None if kind == "none" else found.get(kind, shown)


def parts(mask: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    first = 0
    for width in KEYS:
        keys = slice(first, first + width)
        yield keys, None if mask is None else mask[..., keys]
        first += width


@pytest.mark.parametrize("chunk", [blocks.CHUNK, 60], ids=["at once", "two queries at a time"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_put_together_are_the_whole(shape, kind, chunk):
    q, k, v = inputs(*SHAPES[shape])
    mask = make_mask(kind)
    is_bias = mask is not None and mask.is_floating_point()
    wanted = [q, k, v, *([mask.requires_grad_()] if is_bias else [])]
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    seed = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, wanted, seed)
    with torch.no_grad(), mock.patch.object(blocks, "CHUNK", chunk):
        out = torch.zeros_like(expected)
        lse = torch.full(q.shape[:-1], float("-inf"), dtype=q.dtype)
        for keys, part in parts(mask):
            found = blocks.forward(q, k[:, :, keys], v[:, :, keys], part, 0.3, False)
            blocks.merge(out, lse, *found)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        results = [torch.zeros_like(x) for x in wanted]
        of_mask = results[3] if is_bias else None
        for keys, part in parts(mask):
            into = None if of_mask is None else of_mask[..., keys]
            operands = seed, q, k[:, :, keys], v[:, :, keys], out, blocks.seen(lse)
            found = blocks.backward(*operands, part, 0.3, False, into)
            results[0] += found[0]
            for result, gradient in zip(results[1:3], found[1:], strict=True):
                result[:, :, keys] += gradient
    for result, gradient in zip(results, gradients, strict=True):
        torch.testing.assert_close(result, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [blocks.CHUNK, 60], ids=["at once", "some queries at a time"])
def test_a_block_on_the_diagonal_is_causal(shape, chunk):
    q, k, v = inputs(*SHAPES[shape])
    k, v = (x[:, :, :QUERIES].detach().requires_grad_() for x in (k, v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    gradients = torch.autograd.grad(expected, (q, k, v), torch.ones_like(expected))
    with torch.no_grad(), mock.patch.object(blocks, "CHUNK", chunk):
        out, lse = blocks.forward(q, k, v, None, 0.3, True)
        found = blocks.backward(torch.ones_like(out), q, k, v, out, lse, None, 0.3, True)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for result, gradient in zip(found, gradients, strict=True):
        torch.testing.assert_close(result, gradient, rtol=1e-12, atol=1e-12)


CALLS = {"plain": False, "causal": True}


@pytest.mark.parametrize("causal", CALLS.values(), ids=list(CALLS))
def test_the_kernel_of_cuda_is_called_as_torch_declares_it(causal):
    """Shapes alone: no device is needed."""
    capability = mock.patch.object(blocks, "_capability", return_value=(8, 0))
    with FakeTensorMode(allow_non_fake_inputs=True), capability:
        q = torch.empty(2, 4, 16, 8, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.empty(2, 2, 16, 8, dtype=torch.bfloat16, device="cuda") for _ in "kv")
        out, lse = blocks.forward(q, k, v, None, 0.3, causal)
        found = blocks.backward(out, q, k, v, out, lse, None, 0.3, causal)
    assert (out.shape, out.dtype, lse.dtype) == (q.shape, q.dtype, torch.float32)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (q, k, v)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", CALLS.values(), ids=list(CALLS))
def test_the_kernel_of_cuda_finds_what_is_written_out(causal):
    torch.manual_seed(0)
    heads = (4, 2, 2)
    q, k, v = (torch.randn(2, n, 64, 32, dtype=torch.bfloat16, device="cuda") for n in heads)
    out, lse = blocks.forward(q, k, v, None, 0.3, causal)
    found = (out, lse, *blocks.backward(out, q, k, v, out, lse, None, 0.3, causal))
    with mock.patch.dict(blocks.KERNELS, clear=True):
        plain = blocks.forward(q, k, v, None, 0.3, causal)
        plain += blocks.backward(out, q, k, v, out, lse, None, 0.3, causal)
    for result, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(result.float(), expected.float(), rtol=2e-2, atol=2e-2)
