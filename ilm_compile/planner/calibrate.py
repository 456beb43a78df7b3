"""Measuring this machine: what products, memory, launches and collectives reach here.

The result is the text of a hardware file (`ilm_compile.cost.hardware_file`). Takes under a minute.
Processes measure at once, as ranks compute.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ilm_compile.cost.hardware import GIB, HARDWARE
from ilm_compile.errors import PlanError
from ilm_compile.planner.rank_rates import between, message_seconds, shard_figures
from ilm_compile.planner.rates import DTYPES, SECONDS, figures
from ilm_compile.program.traffic import SENT
from ilm_compile.runtime.communicator import ProcessGroupCommunicator

SIZES = (2**12, 2**18, 2**24)  # bytes of a collective's full tensor, by which a link is told
MESSAGES = (2**8, 2**16, 2**20)  # bytes of a message, by which that of a point to point link is


def calibrate(
    name: str,
    base: str,
    device: torch.device,
    *,
    num_processes: int = 2,
    seconds: float = SECONDS,
) -> str:
    """Return the TOML of a machine called `name`, beginning from `base`, a known one.

    num_processes: local ones that measure at the same time, as ranks would compute, and between
    which collectives are measured; below 2 links stay as in `base`. seconds: for each try. Raises
    `PlanError` for an unknown base, or more processes than there are GPUs.
    """
    if base not in HARDWARE:
        raise PlanError(f"calibrate: base={base!r}; known are {', '.join(HARDWARE)}")
    if device.type == "cuda" and num_processes > torch.cuda.device_count():
        raise PlanError(
            f"calibrate: {num_processes} processes need as many GPUs, found "
            f"{torch.cuda.device_count()}"
        )
    start = HARDWARE[base]
    if num_processes > 1:
        found, links = _together(device, num_processes, seconds)
    else:
        found, links = figures(device, seconds), {}
    flops = {key: found[key] for key in DTYPES}
    lines = [f'name = "{name}"', f'base = "{base}"']
    lines += [f"memory_gib = {memory_bytes(device) / GIB / _sharers(device, num_processes):.2f}"]
    lines += [f"memory_gb_per_s = {found['bytes'] / start.memory_efficiency / 1e9:.2f}"]
    lines += [f"kernel_overhead_us = {found['launch'] * 1e6:.3f}"]
    if start.cores:  # the figures are what programs reach
        peak, lines = flops["bf16"], [*lines, _table("tflops", flops, 1e12)]
        attention = found["attention"] / flops["fp32"]
    else:
        peak = start.peak_flops[torch.bfloat16]
        attention = found["attention"] / peak
    shares = {"matmul": flops["bf16"] / peak, "attention": attention}
    if device.type == "cpu":
        shares["operands"] = found["tile"] / found["bytes"]
        lines.append(f"cores = {os.cpu_count() or 1}")
    lines.append(_table("efficiency", shares, 1))
    for key in ("shard", "shard_parameter"):
        if found.get(key):
            lines.append(f"{key}_us = {found[key] * 1e6:.4g}")
    for kind, (latency, per_byte, climb) in links.items():
        text = f"[{latency * 1e6:.2f}, {1e-9 / per_byte:.4g}, {climb * 1e9:.4g}]"
        lines.append(f"links.{kind}.{2 if kind == 'p2p' else num_processes} = {text}")
    return "\n".join(lines) + "\n"


def memory_bytes(device: torch.device) -> int:
    """Return the memory of the device, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


Figures = dict[str, float]
LinkFigures = dict[str, tuple[float, float, float]]


def _together(
    device: torch.device, num_processes: int, seconds: float
) -> tuple[Figures, LinkFigures]:
    """What each of several processes reaches that measure at once, the median, and their links."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    arguments = [(rank, num_processes, port, device.type, seconds) for rank in range(num_processes)]
    with context.Pool(num_processes) as pool:
        found = pool.starmap(_measure, arguments, chunksize=1)
    each = [figures for figures, _ in found]
    return {key: median(one[key] for one in each) for key in each[0]}, found[0][1]


def _measure(
    rank: int, size: int, port: int, kind: str, seconds: float
) -> tuple[Figures, LinkFigures]:
    """Figures, and of each collective what `link_of` returns, of the bytes that a rank sends."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    backend = "nccl" if kind == "cuda" else "gloo"
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    group = ProcessGroupCommunicator(dist.group.WORLD)
    dist.barrier()
    reached, share = figures(device, seconds), seconds / SECONDS
    calls: dict[str, Callable[[Tensor], Any]] = {
        "all_reduce": lambda x: group.all_reduce(x.view(-1)),
        "all_gather": lambda x: group.all_gather(x[0]),
        "reduce_scatter": group.reduce_scatter,
        "all_to_all": group.all_to_all,
    }
    found = {}
    for name, call in calls.items():
        sizes = [torch.ones(size, n // 4 // size, device=device) for n in SIZES]
        # all to all: x is of one rank, of the tensor that they hold together
        sent = [n * SENT[name](size) * (size if name == "all_to_all" else 1) for n in SIZES]
        found[name] = link_of(sent, [between(partial(call, x), device, share) for x in sizes])
    found["p2p"] = _message_link(rank, device, share)
    if kind == "cpu":
        few = [found[name][0] for name in ("all_gather", "reduce_scatter")]
        reached |= shard_figures(device, share, gather=few[0], reduce=few[1])
    dist.destroy_process_group()
    return reached, found


def link_of(sent: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Return seconds of latency, per byte and per square root of a byte, through three points.

    Without the last where that is not above 0.
    """
    rows = [(1.0, num_bytes, num_bytes**0.5) for num_bytes in sent]
    latency, per_byte, climb = np.linalg.solve(np.array(rows), np.array(seconds)).tolist()
    if min(latency, per_byte, climb) > 0:
        return latency, per_byte, climb
    per_byte = max(1e-13, (seconds[-1] - seconds[0]) / (sent[-1] - sent[0]))
    return seconds[0], per_byte, 0.0


def _message_link(rank: int, device: torch.device, share: float) -> tuple[float, float, float]:
    seconds = [
        message_seconds(torch.ones(size // 4, device=device), rank, share) for size in MESSAGES
    ]
    return link_of(MESSAGES, seconds)


def _sharers(device: torch.device, num_processes: int) -> int:
    return 1 if device.type == "cuda" else max(1, num_processes)


def _table(name: str, figures: dict[str, float], unit: float) -> str:
    entries: Sequence[str] = [f"{key} = {value / unit:.4g}" for key, value in figures.items()]
    return f"{name} = {{ {', '.join(entries)} }}"
