"""How long a call keeps the device busy, from a cold cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median, quantiles
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

FLUSH_BYTES = (
    2**30
)  # many times any L2 cache; writing it takes longer than the host needs to launch
TOTAL_S = 0.02
REPEATS = (5, 40)
WARMUP = 3


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds. host_s: the median that the call kept the host, which the device does not wait for
    unless it is longer than a flush of the cache."""

    median_s: float
    quartiles_s: tuple[float, float]
    host_s: float
    repeats: int


def measure(
    call: Callable[[T], object],
    device: torch.device,
    *,
    before: Callable[[], T],
    smoke: bool = False,
) -> Times:
    """Time `call(before())`, `before` left out: 5 to 40 times, after a few to warm up.

    On CUDA by events around each call, with the L2 cache full of something else. Nothing waits in
    between, and the flush before each call gives the host a lead: the device is never idle inside.
    """
    for _ in range(1 if smoke else WARMUP):
        call(before())
    ((estimate, _),) = _run(call, before, device, 1)
    least, most = (2, 2) if smoke else REPEATS
    count = min(max(int(TOTAL_S / max(estimate, 1e-9)), least), most)
    found = _run(call, before, device, count)
    times = [seconds for seconds, _ in found]
    low, _, high = quantiles(times, n=4, method="inclusive")
    return Times(median(times), (low, high), median(host for _, host in found), count)


def _run(
    call: Callable[[T], object], before: Callable[[], T], device: torch.device, count: int
) -> list[tuple[float, float]]:
    """Seconds on the device and on the host, of each call."""
    if device.type != "cuda":
        seconds = [_on_host(call, before()) for _ in range(count)]
        return [(s, s) for s in seconds]
    buffer = _flush_buffer(device)
    torch.cuda.synchronize()
    marks, hosts = [], []
    for _ in range(count):
        start, end = _event(), _event()
        given = before()
        buffer.zero_()
        start.record()
        hosts.append(_on_host(call, given))
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [(s.elapsed_time(e) * 1e-3, host) for (s, e), host in zip(marks, hosts, strict=True)]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _on_host(call: Callable[[T], object], given: T) -> float:
    start = time.perf_counter()
    call(given)
    return time.perf_counter() - start


def _nothing() -> None:
    return None


@cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


def copy_bandwidth(
    device: torch.device, num_bytes: int | None = None, *, smoke: bool = False
) -> float:
    """Bytes/s that a copy reads and writes, by the fastest of two ways to copy.

    num_bytes: that it reads and writes together, 4 GiB if not given. Of random numbers: a memory
    that compresses zeros would copy those faster.
    """
    count = max((num_bytes or (2**15 if smoke else 2**32)) // 8, 1)
    source = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ways: list[Callable[[None], object]] = [
        lambda _: target.copy_(source),  # the driver's
        lambda _: torch.add(source, 1, out=target),  # a kernel's
    ]
    fastest = min(measure(way, device, before=_nothing, smoke=smoke).median_s for way in ways)
    return 2 * source.nbytes / fastest


# Rows, columns and the inner size: a square, and the products of a block of InternLM2-7B.
PRODUCTS = (
    *((8192, 8192, 8192), (4096, 28672, 4096), (4096, 4096, 14336)),
    *((4096, 6144, 4096), (8192, 14336, 4096)),
)
SMOKE_PRODUCTS = ((64, 64, 64),)


def product_flops(device: torch.device, *, smoke: bool = False) -> dict[str, float]:
    """FLOP/s of bf16 products of random numbers, by their sizes; the most is a ceiling."""
    found = {}
    for rows, columns, inner in SMOKE_PRODUCTS if smoke else PRODUCTS:
        a = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
        b = torch.randn(inner, columns, dtype=torch.bfloat16, device=device)
        times = measure(lambda pair: pair[0] @ pair[1], device, before=_both(a, b), smoke=smoke)
        found[f"{rows} x {columns} x {inner}"] = 2 * rows * columns * inner / times.median_s
    return found


def _both(a: Tensor, b: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (a, b)
