"""Measuring this machine: what products, memory, launches and collectives reach here.

The result is the text of a hardware file (`ilm_compile.cost.hardware_file`). Takes under a minute.
Every figure is the best of several tries: what else runs on the machine makes it slower, never
faster.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.cost.hardware import GIB, HARDWARE
from ilm_compile.errors import PlanError
from ilm_compile.runtime.communicator import ProcessGroupCommunicator

TRIES, SECONDS = 3, 0.4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
SMALL, LARGE = 2**12, 2**24  # bytes of a collective's full tensor, by which a link is told


def calibrate(name: str, base: str, device: torch.device, *, num_processes: int = 2) -> str:
    """Return the TOML of a machine called `name`, beginning from `base`, a known one.

    num_processes: local ones between which collectives are measured; below 2 they stay as in
    `base`. Raises `PlanError` for an unknown base, or more processes than there are GPUs.
    """
    if base not in HARDWARE:
        raise PlanError(f"calibrate: base={base!r}; known are {', '.join(HARDWARE)}")
    if device.type == "cuda" and num_processes > torch.cuda.device_count():
        raise PlanError(
            f"calibrate: {num_processes} processes need as many GPUs, found "
            f"{torch.cuda.device_count()}"
        )
    start = HARDWARE[base]
    flops = {key: product_flops(dtype, device) for key, dtype in DTYPES.items()}
    lines = [f'name = "{name}"', f'base = "{base}"']
    lines += [f"memory_gib = {memory_bytes(device) / GIB / _sharers(device, num_processes):.2f}"]
    lines += [f"memory_gb_per_s = {copy_bandwidth(device) / start.memory_efficiency / 1e9:.2f}"]
    lines += [f"kernel_overhead_us = {launch_seconds(device) * 1e6:.3f}"]
    if start.compute_efficiency == 1:  # the figures are what programs reach
        peak, lines = flops["bf16"], [*lines, _table("tflops", flops, 1e12)]
    else:
        peak = start.peak_flops[torch.bfloat16]
    shares = {"matmul": flops["bf16"] / peak, "attention": attention_flops(device) / peak}
    lines.append(_table("efficiency", shares, 1))
    if num_processes > 1:
        for kind, (latency, per_byte) in link_figures(device, num_processes).items():
            figures = f"[{latency * 1e6:.2f}, {1e-9 / per_byte:.4g}]"
            lines.append(f"links.{kind}.{num_processes} = {figures}")
    return "\n".join(lines) + "\n"


def product_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of a large matrix product."""
    size = 8192 if device.type == "cuda" else 768
    x, weight = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return float(2 * size**3 / best_seconds(partial(F.linear, x, weight), device))


def attention_flops(device: torch.device) -> float:
    """Return the FLOP/s of fused causal attention, of which half the scores count."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, tokens, dim = (32, 4096, 128) if device.type == "cuda" else (4, 512, 64)
    q, k, v = (torch.ones(1, heads, tokens, dim, dtype=dtype, device=device) for _ in range(3))
    run = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    return float(2 * heads * tokens**2 * dim / best_seconds(run, device))


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes/s that a copy of memory larger than any cache reads and writes."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return float(2 * source.nbytes / best_seconds(lambda: target.copy_(source), device))


def launch_seconds(device: torch.device) -> float:
    """Return the seconds of an op that has next to nothing to do."""
    x = torch.ones(16, device=device)

    def many() -> None:
        for _ in range(1000):
            torch.add(x, 1.0)

    return best_seconds(many, device) / 1000


def memory_bytes(device: torch.device) -> int:
    """Return the memory of the device, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def link_figures(device: torch.device, num_processes: int) -> dict[str, tuple[float, float]]:
    """Return seconds of latency and seconds per byte that a rank sends, by collective."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    arguments = [(rank, num_processes, port, device.type) for rank in range(num_processes)]
    with context.Pool(num_processes) as pool:
        return pool.starmap(_measure_links, arguments, chunksize=1)[0]


def _measure_links(rank: int, size: int, port: int, kind: str) -> dict[str, tuple[float, float]]:
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    backend = "nccl" if kind == "cuda" else "gloo"
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    group = ProcessGroupCommunicator(dist.group.WORLD)
    # The share of the full tensor that a rank sends: ring algorithms, as in nccl-tests.
    calls: dict[str, tuple[Callable[[Tensor], Any], float]] = {
        "all_reduce": (lambda x: group.all_reduce(x.view(-1)), 2 * (size - 1) / size),
        "all_gather": (lambda x: group.all_gather(x[0]), (size - 1) / size),
        "reduce_scatter": (group.reduce_scatter, (size - 1) / size),
        "all_to_all": (group.all_to_all, (size - 1) / size),
    }
    found = {}
    for name, (call, share) in calls.items():
        times = [_collective_seconds(call, size, num_bytes, device) for num_bytes in (SMALL, LARGE)]
        per_byte = (times[1] - times[0]) / ((LARGE - SMALL) * share)
        found[name] = (times[0], max(per_byte, 1e-13))
    dist.destroy_process_group()
    return found


def _collective_seconds(
    call: Callable[[Tensor], Any], size: int, num_bytes: int, device: torch.device
) -> float:
    x = torch.ones(size, num_bytes // 4 // size, device=device)
    times = []
    for _ in range(8):  # as often on every rank
        dist.barrier()
        start = time.perf_counter()
        call(x)
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def best_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the least seconds of a call, over tries that each go on for a while."""
    run()
    _wait(device)
    best = float("inf")
    for _ in range(TRIES):
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < SECONDS or not count:
            run()
            count += 1
            if device.type != "cuda":
                best = min(best, time.perf_counter() - start - passed)
        _wait(device)
        if device.type == "cuda":
            best = min(best, (time.perf_counter() - start) / count)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sharers(device: torch.device, num_processes: int) -> int:
    return 1 if device.type == "cuda" else max(1, num_processes)


def _table(name: str, figures: dict[str, float], unit: float) -> str:
    entries: Sequence[str] = [f"{key} = {value / unit:.4g}" for key, value in figures.items()]
    return f"{name} = {{ {', '.join(entries)} }}"
