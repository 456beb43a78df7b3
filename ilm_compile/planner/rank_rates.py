"""What ranks take for each other on this machine: a collective in a step, FSDP around a unit.

Always beside compute: ranks that compute are never ready at once, and one that waits wakes up
slowly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ilm_compile.planner.rates import wait
from ilm_compile.runtime.data_parallel import ShardedSync, shard

LOOPS = 5  # with and without, of which the middle one counts
CALLS, STEPS = 12, 4  # of a collective, and of units of FSDP, in a loop
WIDTH, PRODUCTS = 256, 12  # rows and columns of the products between calls, and how many
UNITS, FEW, MANY = 4, 1, 9  # units of FSDP, and how many parameters each has
SMALL = 64  # rows and columns of one


def between(run: Callable[[], Any], device: torch.device, share: float) -> float:
    """Return the usual seconds of what all ranks do again and again, each after it has computed.

    share: of the usual number of times.
    """
    compute = _Compute(device)

    def both() -> None:
        compute()
        run()

    return longer(both, compute, device, max(2, round(share * CALLS)))


def message_seconds(x: Tensor, rank: int, share: float) -> float:
    """Return the usual seconds of a message between the first two ranks.

    They compute in turn, as stages do that wait for each other: who waits has slept for a while.
    """
    compute, received, other = _Compute(x.device), torch.empty_like(x), 1 - rank

    def turn() -> None:
        if rank == 0:
            compute()
            dist.send(x, other)
            dist.recv(received, other)
        elif rank == 1:
            dist.recv(received, other)
            compute()
            dist.send(x, other)

    def alone() -> None:
        compute()
        compute()

    return longer(turn, alone, x.device, max(2, round(share * CALLS))) / 2


class _Compute:
    """Some products, a few milliseconds on a processor."""

    def __init__(self, device: torch.device) -> None:
        self.x = torch.ones(WIDTH, WIDTH, device=device)

    def __call__(self) -> None:
        for _ in range(PRODUCTS):
            torch.mm(self.x, self.x)


def longer(
    run: Callable[[], Any], other: Callable[[], Any], device: torch.device, calls: int
) -> float:
    """Return by how many seconds a call of `run` takes longer than one of `other`."""
    took = []
    for call in [other, run] * LOOPS:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
        took.append((time.perf_counter() - start) / calls)
    return max(1e-7, median(took[1::2]) - median(took[::2]))


class _Unit(nn.Module):
    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        weights = [nn.Parameter(torch.eye(SMALL)) for _ in range(num_parameters)]
        self.weights = nn.ParameterList(weights)
        self.compute = _Compute(torch.device("cpu"))

    def forward(self, x: Tensor) -> Tensor:
        self.compute()
        for weight in self.weights:
            x = x @ weight
        return x


def _train(model: nn.Module, x: Tensor) -> None:
    torch.autograd.backward(model(x).sum())


def shard_figures(
    device: torch.device, share: float, *, gather: float, reduce: float
) -> dict[str, float]:
    """Return what the host takes for a unit that is gathered or reduced, and for each parameter.

    gather, reduce: seconds of a small collective, which are not in it.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    found, steps = [], max(1, round(share * STEPS))
    for count in (FEW, MANY):
        plain, sharded = (
            nn.Sequential(*(_Unit(count) for _ in range(UNITS))).to(device) for _ in range(2)
        )
        for module in [*sharded, sharded]:
            shard(module, mesh, zero=3)
        ShardedSync(sharded, zero=3).resume()
        x = torch.ones(WIDTH, SMALL, device=device)
        seconds = longer(partial(_train, sharded, x), partial(_train, plain, x), device, steps)
        found.append(seconds / (3 * UNITS))  # gathered twice, reduced once
    each = max(0.0, (found[1] - found[0]) / (MANY - FEW))
    return {
        "shard": max(0.0, found[0] - each * FEW - (2 * gather + reduce) / 3),
        "shard_parameter": each,
    }
