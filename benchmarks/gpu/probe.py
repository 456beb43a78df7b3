"""First contact: what this card can do, whose attention is fastest on it, what the host costs.

The shapes are those of one sequence of InternLM2-7B. An item that fails leaves its traceback, and
the next one is run.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.failure import Result, SectionError
from benchmarks.gpu.reference import relative_error
from benchmarks.gpu.timing import copy_bandwidth, measure, product_flops
from ilm_compile import kernels
from ilm_compile.kernels.attention_order import FLASH_VERSIONS, attention_order

DTYPE = torch.bfloat16
SHAPE, SMOKE_SHAPE = (
    (1, 4096, 32, 8, 128),
    (1, 64, 4, 2, 16),
)  # rows, tokens, heads, key heads, size
CALLS, SMOKE_CALLS = 300, 3  # of an op whose host time is taken


def probe(device: torch.device, smoke: bool, result: Result) -> None:
    """Ceilings in bytes and FLOP/s, attention in FLOP/s by who computes it, host seconds by op."""
    for name, item in ITEMS.items():
        try:
            item(device, smoke, result.setdefault(name, {}))
        except Exception:
            result[name]["error"] = traceback.format_exc()
    failed = [name for name in ITEMS if "error" in result[name]]
    if failed:
        raise SectionError(f"failed: {', '.join(failed)}")


def ceilings(device: torch.device, smoke: bool, result: Result) -> None:
    result["copy_bytes_per_s"] = copy_bandwidth(device, smoke=smoke)
    result["product_flops"] = product_flops(device, smoke=smoke)


def attention(device: torch.device, smoke: bool, result: Result) -> None:
    """Each way's FLOP/s, forward and backward, and how far it is from the first one."""
    rows, tokens, heads, key_heads, size = SMOKE_SHAPE if smoke else SHAPE
    q, k, v = (
        torch.randn(rows, tokens, n, size, device=device, dtype=DTYPE, requires_grad=True)
        for n in (heads, key_heads, key_heads)
    )
    grad = torch.randn_like(q)
    flops = 2 * rows * heads * tokens * tokens * size  # of scores and values, half of them masked
    expected: list[Tensor] = []
    for name, (call, order) in _ways(device).items():
        try:
            with order():
                found = [out := call(q, k, v), *torch.autograd.grad(out, (q, k, v), grad)]
                expected = expected or found
                pairs = zip(found, expected, strict=True)
                error = max(relative_error(x.detach(), y.detach()) for x, y in pairs)
                forward = measure(
                    lambda way: way(q, k, v), device, before=partial(_itself, call), smoke=smoke
                )
                backward = measure(
                    lambda out: torch.autograd.grad(out, (q, k, v), grad),
                    device,
                    before=partial(call, q, k, v),
                    smoke=smoke,
                )
        except Exception as error_:
            result[name] = {"left_out": f"{type(error_).__name__}: {error_}".splitlines()[0][:300]}
            continue
        result[name] = {
            "forward_flops": flops / forward.median_s,
            "backward_flops": 2.5 * flops / backward.median_s,
            "from_the_first": error,
        }


Way = Callable[..., Tensor]
Order = Callable[[], AbstractContextManager[Any]]


def _ways(device: torch.device) -> dict[str, tuple[Way, Order]]:
    ordered = partial(attention_order, device)
    ways: dict[str, tuple[Way, Order]] = {
        "ilm": (kernels.attention, ordered),
        "sdpa": (_sdpa, nullcontext),
    }
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        ways[f"sdpa, {backend.name}"] = (_sdpa, partial(sdpa_kernel, backend))
    ways["varlen, few key heads"] = (_varlen, nullcontext)
    for name in FLASH_VERSIONS:
        ways[f"sdpa, {name}"] = (_sdpa, partial(_flash, name))
    return ways


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(
        1, 2
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    length = q.shape[1]
    bounds = torch.tensor([0, length], device=q.device, dtype=torch.int32)
    grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    found: Tensor = varlen_attn(
        *(q[0], k[0], v[0], bounds, bounds, length, length), window_size=(-1, 0), **grouped
    )
    return found[None]


@contextmanager
def _flash(name: str) -> Iterator[None]:
    kernels.set_flash_attention(name)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    finally:
        kernels.set_flash_attention(None)


def host(device: torch.device, smoke: bool, result: Result) -> None:
    """Seconds that a call keeps the host, on tensors too small to keep the device."""
    x = torch.randn(8, 4096, device=device, dtype=DTYPE, requires_grad=True)
    weight = torch.ones(4096, device=device, dtype=DTYPE, requires_grad=True)
    grad = torch.randn_like(x)
    calls: dict[str, Callable[[], object]] = {
        "add": lambda: x + x,
        "torch rms_norm": lambda: F.rms_norm(x, (4096,), weight, 1e-5),
        "ilm rms_norm": lambda: kernels.rms_norm(x, weight, 1e-5),
        "ilm rms_norm, both ways": lambda: torch.autograd.grad(
            kernels.rms_norm(x, weight, 1e-5), (x, weight), grad
        ),
    }
    count = SMOKE_CALLS if smoke else CALLS
    for name, call in calls.items():
        for _ in range(count // 3):
            call()
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        result[name] = (time.perf_counter() - start) / count
        _wait(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _itself(call: Way) -> Way:
    return call


ITEMS: dict[str, Callable[[torch.device, bool, Result], None]] = {
    "ceilings": ceilings,
    "attention": attention,
    "host": host,
}
