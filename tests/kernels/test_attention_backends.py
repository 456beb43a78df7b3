"""The backends of ilm::attention on CUDA: what they are given, which is chosen, what is said.

There is no GPU here: stand-ins that check their arguments take the place of the packages' kernels.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import varlen

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels import attention, attention_backends, set_attention_backend
from ilm_compile.kernels.attention_backends import BACKENDS, choose, obstacle
from ilm_compile.kernels.documents import boundaries as make_boundaries
from tests.kernels.test_attention import (
    BATCH,
    HEAD_DIM,
    SEQ,
    boundaries,
    inputs,
    kv_heads,
    some_queries,
)

HOPPER, TURING = (9, 0), (7, 5)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _best_backend() -> Iterator[None]:
    set_attention_backend(None)
    yield
    set_attention_backend(None)


def flattened_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float | None,
) -> Tensor:
    """What both packages compute: q (tokens, heads, head_dim), int32 bounds from 0 to tokens.

    Of each document the queries are its last ones, as many as there are.
    """
    for bounds, x in ((bounds_q, q), (bounds_k, k)):
        assert bounds.dtype == torch.int32
        assert (bounds[0], bounds[-1]) == (0, len(x))
    parts = []
    for (start, stop), (first, last) in zip(
        pairwise(bounds_q.tolist()), pairwise(bounds_k.tolist()), strict=True
    ):
        assert (stop - start <= longest_q, last - first <= longest_k) == (True, True)
        if start < stop:
            keys = (x[None, first:last] for x in (k, v))
            tokens = [last - first - (stop - start), last - first]
            parts.append(attention(q[None, start:stop], *keys, None, scale, tokens)[0])
    return torch.cat(parts)


def flash_stand_in(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, softmax_scale, causal):
    assert causal
    lengths = bounds_q, bounds_k, longest_q, longest_k
    return flattened_attention(q, k, v, *lengths, softmax_scale)


def varlen_stand_in(
    q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, scale, window_size, enable_gqa=False
):
    assert window_size == (-1, 0)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return flattened_attention(q, k, v, bounds_q, bounds_k, longest_q, longest_k, scale)


def older_varlen(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, scale, window_size):
    return flattened_attention(q, k, v, bounds_q, bounds_k, longest_q, longest_k, scale)


def install_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


STAND_INS: dict[str, tuple[str, Callable[..., Any] | None]] = {
    "flash_attn": ("flash_attn", None),
    "varlen": ("varlen", varlen_stand_in),
    "varlen of an older torch": ("varlen", older_varlen),
    "sdpa": ("sdpa", None),
}


@boundaries
@kv_heads
@pytest.mark.parametrize("is_made", [False, True], ids=["cu_seqlens", "made before"])
@pytest.mark.parametrize("tokens", [None, [0, 2, 6, 8]], ids=["whole", "head and tail"])
@pytest.mark.parametrize("stand_in", STAND_INS.values(), ids=list(STAND_INS))
def test_every_backend_is_the_op(
    monkeypatch, stand_in, tokens, is_made, kv_heads, cu_seqlens
) -> None:
    name, function = stand_in
    install_flash_attn(monkeypatch)
    monkeypatch.setattr(varlen, "varlen_attn", function)
    monkeypatch.setattr(attention_backends, "choose", lambda *_, **__: BACKENDS[name]())
    ours, plain = inputs(kv_heads), inputs(kv_heads)
    if tokens is not None:
        for each in (ours, plain):
            each[0] = some_queries(each[0], tokens)
    given = cu_seqlens
    if is_made and cu_seqlens is not None:
        given = torch.ops.ilm.document_boundaries(cu_seqlens, BATCH, SEQ, tokens)
    out = attention_backends.attention(*ours, given, 0.3, tokens)
    expected = attention(*plain, cu_seqlens, 0.3, tokens)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-13)
    grad = torch.randn_like(out)
    mine, other = torch.autograd.grad(out, ours, grad), torch.autograd.grad(expected, plain, grad)
    for x, y in zip(mine, other, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


def test_boundaries_over_all_tokens() -> None:
    def sides(cu_seqlens, tokens=None) -> list[list[list[int]]]:
        made = make_boundaries(cu_seqlens, 2, 8, tokens, CPU)
        assert made.dtype == torch.int32
        return made.flatten(2).tolist()

    rows = torch.tensor([[0, 3, 8, 8], [0, 1, 5, 8]])
    assert sides(rows) == [[[0, 3, 8, 8, 8, 8, 9, 13, 16, 16]]]
    assert sides(None) == [[[0, 8, 8, 16]]]
    assert sides(torch.tensor([0, 5])) == [[[0, 5, 16]]]
    asked, seen = [0, 1, 4, 4, 4, 4, 4, 7, 8, 8], [0, 3, 6, 6, 6, 6, 7, 11, 12, 12]
    assert sides(rows, [2, 6]) == [[asked, seen]]


OBSTACLES = {
    "fits": ("flash_attn", torch.bfloat16, 128, HOPPER, None),
    "float32": ("flash_attn", torch.float32, 128, HOPPER, "not torch.float32"),
    "wide heads": ("flash_attn", torch.float16, 264, HOPPER, "up to 256 .* not 264"),
    "odd heads": ("flash_attn", torch.float16, 20, HOPPER, "that 8 divides, not 20"),
    "old device": ("flash_attn", torch.float16, 64, TURING, "8.0, here is 7.5"),
    "no device": ("flash_attn", torch.float16, 64, None, "no device is visible"),
    "sdpa takes all": ("sdpa", torch.float64, 20, None, None),
}


@pytest.mark.parametrize(
    ("name", "dtype", "dim", "capability", "why"), OBSTACLES.values(), ids=list(OBSTACLES)
)
def test_obstacles(monkeypatch, name, dtype, dim, capability, why) -> None:
    install_flash_attn(monkeypatch)
    found = obstacle(name, dtype, dim, capability)
    if why is None:
        assert found is None
    else:
        assert re.search(why, str(found))


def pretend_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)


def test_the_choice_and_its_reasons_are_logged_once(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # makes its import fail
    pretend_hopper(monkeypatch)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        choose(torch.bfloat16, 64, CPU)
    (record,) = caplog.records
    assert record.name == "ilm_compile.kernels.attention_backends"
    message = record.getMessage()
    assert "torch.bfloat16, head size 64, on cpu: varlen" in message
    assert "not flash_attn: import of flash_attn halted" in message


def test_flash_attn_is_preferred_where_installed(monkeypatch, caplog) -> None:
    install_flash_attn(monkeypatch)
    pretend_hopper(monkeypatch)
    caplog.set_level(logging.INFO)
    choose(torch.bfloat16, 64, CPU)
    assert "on cpu: flash_attn (the best there is)" in caplog.text


def test_rows_of_one_document_go_to_sdpa_and_repeat_no_keys(monkeypatch) -> None:
    install_flash_attn(monkeypatch)
    pretend_hopper(monkeypatch)
    seen = []

    def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((k.shape[1], v.shape[1], options))
        return torch.zeros_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    monkeypatch.setattr(attention_backends, "boundaries", None)  # nobody makes them
    q, k = (torch.zeros(2, 8, heads, 64, dtype=torch.bfloat16) for heads in (8, 2))
    attention_backends.attention(q, k, k)
    assert seen == [(2, 2, {"is_causal": True, "scale": None, "enable_gqa": True})]


def test_float32_goes_to_sdpa(monkeypatch, caplog) -> None:
    install_flash_attn(monkeypatch)
    pretend_hopper(monkeypatch)
    caplog.set_level(logging.INFO)
    assert choose(torch.float32, 64, CPU) is BACKENDS["sdpa"]()
    assert "sdpa (the best there is); not flash_attn: it takes float16" in caplog.text
    assert "; not varlen: it takes float16" in caplog.text


def test_a_forced_backend_is_taken(monkeypatch, caplog) -> None:
    install_flash_attn(monkeypatch)
    pretend_hopper(monkeypatch)
    caplog.set_level(logging.INFO)
    set_attention_backend("sdpa")
    assert choose(torch.bfloat16, 64, CPU) is BACKENDS["sdpa"]()
    assert "on cpu: sdpa (set_attention_backend)" in caplog.text


def test_a_forced_backend_that_does_not_fit_is_refused(monkeypatch) -> None:
    install_flash_attn(monkeypatch)
    pretend_hopper(monkeypatch)
    set_attention_backend("flash_attn")
    with pytest.raises(IlmCompileError, match=r"'flash_attn'\) does not fit .* not torch.float32"):
        choose(torch.float32, 64, CPU)


def test_unknown_and_missing_backends_are_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(IlmCompileError, match="one of flash_attn, varlen, sdpa, or None; got 'fa'"):
        set_attention_backend("fa")
    with pytest.raises(IlmCompileError, match="flash_attn cannot be imported"):
        set_attention_backend("flash_attn")


def test_an_older_varlen_is_an_obstacle(monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, is_causal=False: q)
    reason = obstacle("varlen", torch.bfloat16, 64, HOPPER)
    assert reason == "this torch's varlen_attn takes no window_size and scale"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [None, [0, 64, 192, 256]], ids=["whole", "head and tail"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_on_cuda_the_best_backend_is_the_op(packed, tokens) -> None:
    """Grouped keys, boundaries made before, queries of one rank of two."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 256, n, 64, dtype=torch.float64).requires_grad_() for n in (4, 2, 2)]
    low = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    starts = torch.tensor([[0, 100, 256], [0, 256, 256]], dtype=torch.int32) if packed else None
    given = starts
    if packed:
        given = torch.ops.ilm.document_boundaries(starts.cuda(), 2, 256, tokens)
    results = []
    for (q, *keys), documents in ((exact, starts), (low, given)):
        asked = q if tokens is None else some_queries(q, tokens)
        out = attention(asked, *keys, documents, None, tokens)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, *keys))])
    for expected, found in zip(*results, strict=True):
        found = found.cpu().double()
        assert (found - expected).norm() <= 2e-2 * expected.norm()


class Attend(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)


@pytest.fixture
def devices(monkeypatch) -> list[str]:
    """The devices of the queries that reach the backends, which compute shapes alone."""
    seen: list[str] = []

    def backend(q: Tensor, *rest: Any) -> Tensor:
        seen.append(q.device.type)
        return torch.empty_like(q)

    monkeypatch.setattr(attention_backends, "attention", backend)
    return seen


def fake_inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty(BATCH, SEQ, n, HEAD_DIM, device=device) for n in (4, 2, 2))
    return q, k, v


def test_cuda_tensors_reach_the_backend_above_autograd(devices) -> None:
    with FakeTensorMode():
        out = attention(*fake_inputs("cuda"))
    assert out.shape == (BATCH, SEQ, 4, HEAD_DIM)
    assert devices == ["cuda"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_exported_graph_has_one_node(devices, device: str) -> None:
    with FakeTensorMode():
        graph = torch.export.export(Attend(), fake_inputs(device)).graph
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.ilm.attention.default]
