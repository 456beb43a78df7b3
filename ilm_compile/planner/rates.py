"""What one process reaches on this machine: products, attention, memory, and launches.

Every figure is the best of several tries: what else runs on the machine makes it slower, never
faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

TRIES, SECONDS = 3, 0.3  # of each figure
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
# Rows, inputs and outputs of the products by which a processor's arithmetic is told from what it
# reads and writes; `POOL` bytes of operands are used in turn, so that none lies in a near cache.
PRODUCTS = ((64, 256, 512), (128, 512, 256), (256, 256, 1024), (256, 512, 512))
POOL = 2**24


def figures(device: torch.device, seconds: float = SECONDS) -> dict[str, float]:
    """Return FLOP/s by dtype and of attention, bytes/s, seconds; each tried for `seconds`."""
    found = {key: product_flops(dtype, device, seconds) for key, dtype in DTYPES.items()}
    if device.type == "cpu":
        found["fp32"], found["tile"] = product_rates(seconds)
    return found | {
        "attention": attention_flops(device, seconds),
        "bytes": copy_bandwidth(device, seconds),
        "launch": launch_seconds(device, seconds),
    }


def product_flops(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Return the FLOP/s of a large matrix product."""
    size = 8192 if device.type == "cuda" else 512
    x, weight = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return float(2 * size**3 / best_seconds(partial(F.linear, x, weight), device, seconds))


def product_rates(seconds: float) -> tuple[float, float]:
    """Return the FLOP/s and the bytes/s of a processor's products in float32, beside each other.

    Those that explain the seconds of products of several shapes, a forward's and the two of its
    backward, whose operands are not at hand: t = FLOPs / the one + bytes / the other.
    """
    rows = []
    for m, k, n in PRODUCTS:
        num_bytes = 4 * (m * k + k * n + m * n)
        shapes, count = ((m, k), (n, k), (m, n)), max(2, POOL // num_bytes)
        sets = [[torch.randn(shape) for shape in shapes] for _ in range(count)]
        for product in (
            lambda x, w, g: torch.mm(x, w.t()),
            lambda x, w, g: torch.mm(g, w),
            lambda x, w, g: torch.mm(g.t(), x),
        ):
            calls = [partial(product, *each) for each in sets]
            least = best_mean(calls, seconds)
            rows.append((2 * m * k * n / least, num_bytes / least))
    # Relative errors: every row is divided by its seconds.
    per_flop, per_byte = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
    if per_byte <= 0:  # in the noise: nothing beside the arithmetic
        return float(np.median([flops for flops, _ in rows])), 1e15
    return float(1 / per_flop), float(1 / per_byte)


def attention_flops(device: torch.device, seconds: float) -> float:
    """Return the FLOP/s of fused causal attention, forward and backward; half the scores count."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, 32, 4096, 128) if device.type == "cuda" else (4, 8, 128, 32)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))

    def run() -> None:
        result = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(result.sum(), (q, k, v))

    rows, heads, tokens, dim = shape
    return float(3 * 2 * rows * heads * tokens**2 * dim / best_seconds(run, device, seconds))


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Return the bytes/s that a copy of memory larger than any cache reads and writes."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return float(2 * source.nbytes / best_seconds(lambda: target.copy_(source), device, seconds))


def launch_seconds(device: torch.device, seconds: float) -> float:
    """Return the seconds of an op that has next to nothing to do, forward and backward alike."""
    x = torch.ones(16, device=device, requires_grad=True)
    many = 200

    def run() -> None:
        y = x
        for _ in range(many):
            y = torch.add(y, 1.0)
        torch.autograd.grad(y.sum(), x)

    return best_seconds(run, device, seconds) / (2 * many)


def best_mean(calls: Sequence[Callable[[], Any]], seconds: float) -> float:
    """Return the mean of the least seconds of each of `calls`, done in turn for so long."""
    best, stop = [float("inf")] * len(calls), time.perf_counter() + seconds
    while time.perf_counter() < stop or best[0] == float("inf"):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[place] = min(best[place], time.perf_counter() - start)
    return sum(best) / len(best)


def best_seconds(run: Callable[[], Any], device: torch.device, seconds: float = SECONDS) -> float:
    """Return the least seconds of a call, over tries that each go on for a while."""
    run()
    wait(device)
    best = float("inf")
    for _ in range(TRIES):
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds or not count:
            run()
            count += 1
            if device.type != "cuda":
                best = min(best, time.perf_counter() - start - passed)
        wait(device)
        if device.type == "cuda":
            best = min(best, (time.perf_counter() - start) / count)
    return best


def wait(device: torch.device) -> None:
    """Return once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
