"""What one process reaches on this machine: products, attention, memory, and launches.

Every figure is the middle of several tries, as a step takes no call's best. On a processor times
are those of this thread, which what else runs on the machine does not lengthen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.cost.layer_time import ATTENTION_BACKWARD
from ilm_compile.kernels.attention import attention

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
    found["attention"] = attention_flops(device, seconds)
    found["bytes"] = copy_bandwidth(device, seconds)
    return found | {"launch": launch_seconds(device, seconds, found)}


def product_flops(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Return the FLOP/s of a large matrix product."""
    size = 8192 if device.type == "cuda" else 512
    x, weight = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return float(2 * size**3 / usual_seconds(partial(F.linear, x, weight), device, seconds))


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
            taken = usual_mean(calls, seconds)
            rows.append((2 * m * k * n / taken, num_bytes / taken))
    # Relative errors: every row is divided by its seconds.
    per_flop, per_byte = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
    if per_byte <= 0:  # in the noise: nothing beside the arithmetic
        return float(np.median([flops for flops, _ in rows])), 1e15
    return float(1 / per_flop), float(1 / per_byte)


def attention_flops(device: torch.device, seconds: float) -> float:
    """Return the FLOP/s of fused causal attention, forward and backward; half the scores count."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, 4096, 32, 128) if device.type == "cuda" else (ROWS, TOKENS, HEADS, WIDTH // HEADS)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))

    def run() -> None:
        torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))

    rows, tokens, heads, dim = shape
    flops = (1 + ATTENTION_BACKWARD) * 2 * rows * heads * tokens**2 * dim
    return float(flops / usual_seconds(run, device, seconds))


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Return the bytes/s that a copy of memory larger than any cache reads and writes."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return float(2 * source.nbytes / usual_seconds(lambda: target.copy_(source), device, seconds))


def launch_seconds(device: torch.device, seconds: float, found: Mapping[str, float]) -> float:
    """Return what the host takes for an op of a block, forward and backward alike.

    Views and the sums of gradients with it. On a processor the ops are of a common size, since
    what lies between them drives the host's own code out of its caches, and what they compute
    takes as long as `found` says; a GPU computes next to nothing.
    """
    rows, tokens, width = (ROWS, TOKENS, WIDTH) if device.type == "cpu" else (1, 8, 16)
    shapes = {"norm": (width,), "qkv": (width, width), "out": (width, width)}
    shapes |= {"up": (4 * width, width), "down": (width, 2 * width)}
    weights = [
        {name: torch.full(shape, 0.01, device=device) for name, shape in shapes.items()}
        for _ in range(BLOCKS)
    ]
    for weight in (one for block in weights for one in block.values()):
        weight.requires_grad_()
    x = torch.ones(rows, tokens, width, device=device, requires_grad=True)

    def run() -> None:
        y = x
        for block in weights:
            y = _block(y, block)
        torch.autograd.backward(y.sum())

    computed = 0.0
    if device.type == "cpu":
        m = rows * tokens
        for name in ("qkv", "out", "up", "down"):
            n, k = shapes[name]
            num_bytes = 4 * (m * n + n * k + m * k)
            computed += 2 * m * n * k / found["fp32"] + num_bytes / found["tile"]
        computed += (1 + ATTENTION_BACKWARD) / 3 * 2 * rows * tokens**2 * width / found["attention"]
        computed += 4 * m * width * BLOCK_TRAFFIC / found["bytes"]
    whole = usual_seconds(run, device, seconds) / BLOCKS
    return max(1e-6, (whole - 3 * computed) / (2 * BLOCK_OPS))


# A block of common size, and of its ops those that are no views; what those that are no products
# read and write, in values of the width a token.
ROWS, TOKENS, HEADS, WIDTH, BLOCKS = 4, 64, 8, 256, 4
BLOCK_OPS, BLOCK_TRAFFIC = 18, 29


def _block(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    rows, tokens, width = x.shape
    q = F.linear(F.rms_norm(x, (width,), weights["norm"]), weights["qkv"])
    a, b = q[..., : width // 2], q[..., width // 2 :]
    q = torch.cat((a * 0.5 - b * 2.0, a * 2.0 + b * 0.5), -1)
    q = q.view(rows, tokens, HEADS, -1)
    mixed = attention(q, q, q).view(rows, tokens, width)
    x = x + F.linear(mixed, weights["out"])
    up = F.linear(F.rms_norm(x, (width,), weights["norm"]), weights["up"])
    return x + F.linear(F.silu(up[..., : 2 * width]) * up[..., 2 * width :], weights["down"])


def usual_mean(calls: Sequence[Callable[[], Any]], seconds: float) -> float:
    """Return the mean of the usual seconds of each of `calls` on a processor, done in turn."""
    taken: list[list[float]] = [[] for _ in calls]
    stop = time.thread_time() + seconds
    while time.thread_time() < stop or not taken[0]:
        for times, call in zip(taken, calls, strict=True):
            start = time.thread_time()
            call()
            times.append(time.thread_time() - start)
    return mean(map(median, taken))


def usual_seconds(run: Callable[[], Any], device: torch.device, seconds: float = SECONDS) -> float:
    """Return the usual seconds of a call, over tries that each go on for a while."""
    run()
    wait(device)
    if device.type == "cpu":
        return usual_mean([run], TRIES * seconds)
    tries = []
    for _ in range(TRIES):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or not count:
            run()
            count += 1
        wait(device)
        tries.append((time.perf_counter() - start) / count)
    return median(tries)


def wait(device: torch.device) -> None:
    """Return once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
