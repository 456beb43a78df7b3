"""Collectives over torch.distributed, for graph code that names a mesh axis only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ilm_compile.program.communicator import Communicator
from ilm_compile.program.traffic import Traffic, sent_bytes

# torch 2.13 renamed these two and warns about the old names, the only ones that 2.11 knows.
all_gather_single: Callable[..., Any] = (
    dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
)
reduce_scatter_single: Callable[..., Any] = (
    dist.reduce_scatter_single
    if hasattr(dist, "reduce_scatter_single")
    else dist.reduce_scatter_tensor
)

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class MeasuredCommunicator(Communicator, Protocol):
    """One that counts and times: see `ProcessGroupCommunicator`."""

    stats: dict[str, Traffic]
    waits: list[tuple[float, float]] | None


@dataclass(slots=True)
class ProcessGroupCommunicator:
    """The ranks of one process group. `stats` counts what this rank sent, by kind of collective.

    waits: where it is a list, every collective adds (start, end) in seconds of `time.perf_counter`:
    how long the call took, which on CUDA is only how long it took to launch.
    """

    group: dist.ProcessGroup
    rank: int = field(init=False)
    size: int = field(init=False)
    stats: dict[str, Traffic] = field(init=False, default_factory=dict)
    waits: list[tuple[float, float]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.rank, self.size = self.group.rank(), self.group.size()

    def symmetric_group(self, x: Tensor) -> str:
        """The name by which torch's ops over symmetric memory know the group; "" for the CPU."""
        return self.group.group_name if x.is_cuda else ""

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        return self._done("all_reduce", x, _OPS[op])

    def all_gather(self, x: Tensor) -> Tensor:
        return self._done("all_gather", x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self._done("reduce_scatter", x)

    def all_to_all(self, x: Tensor) -> Tensor:
        return self._done("all_to_all", x)

    def start(self, kind: str, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        result, collective, args = self._prepared(kind, x)
        work = collective(*args, group=self.group, async_op=True)

        def wait() -> None:
            start = time.perf_counter()
            work.wait()
            args.clear()  # what was sent is kept until then
            if self.waits is not None:
                self.waits.append((start, time.perf_counter()))

        return result, wait

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        result = x.new_empty((sum(received), *x.shape[1:]))
        self._call(dist.all_to_all_single, result, x.contiguous(), received, sent)
        away = sum(sent) - sent[self.rank]
        self.stats.setdefault("all_to_all", Traffic()).add(away * x[:1].nbytes)
        return result

    def shift(self, xs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        sent = [x.contiguous() for x in xs]  # kept until they have arrived
        found = [torch.empty_like(x) for x in sent]
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(operation, x, group=self.group, group_peer=peer, tag=tag)
                for tag, pair in enumerate(zip(sent, found, strict=True))
                for operation, x, peer in zip(
                    (dist.isend, dist.irecv), pair, (after, before), strict=True
                )
            ]
        )
        self.stats.setdefault("shift", Traffic()).add(sum(x.nbytes for x in sent))

        def wait() -> list[Tensor]:
            start = time.perf_counter()
            for work in works:
                work.wait()
            sent.clear()
            if self.waits is not None:
                self.waits.append((start, time.perf_counter()))
            return found

        return wait

    def count_pieces(self, piece: Tensor) -> None:
        """Count what an op has moved: the pieces of all other ranks, each like `piece`."""
        others = self.size - 1
        self.stats.setdefault("shift", Traffic()).add(others * piece.nbytes, others)

    def _prepared(self, kind: str, x: Tensor) -> tuple[Tensor, Callable[..., Any], list[Any]]:
        """Count a collective. Returns where its result will be, its function and arguments."""
        full_bytes = x.nbytes * (self.size if kind in ("all_gather", "all_to_all") else 1)
        self.stats.setdefault(kind, Traffic()).add(sent_bytes(kind, full_bytes, self.size))
        if kind == "all_reduce":
            result = x.clone(memory_format=torch.contiguous_format)
            return result, dist.all_reduce, [result]
        x = x.contiguous()
        if kind == "all_to_all":
            result = torch.empty_like(x)
            return result, dist.all_to_all_single, [result, x]
        is_gather = kind == "all_gather"
        result = x.new_empty((self.size, *x.shape) if is_gather else x.shape[1:])
        single = all_gather_single if is_gather else reduce_scatter_single
        return result, single, [result.view(-1), x.view(-1)]

    def _done(self, kind: str, x: Tensor, *options: Any) -> Tensor:
        result, collective, args = self._prepared(kind, x)
        self._call(collective, *args, *options)
        return result

    def _call(self, collective: Callable[..., Any], *args: Any) -> None:
        start = time.perf_counter()
        collective(*args, group=self.group)
        if self.waits is not None:
            self.waits.append((start, time.perf_counter()))


class SingleCommunicator:
    """An axis of one rank: every collective is the identity, and nothing is moved."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.stats: dict[str, Traffic] = {}
        self.waits: list[tuple[float, float]] | None = None

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        return x.clone()

    def all_gather(self, x: Tensor) -> Tensor:
        return x.clone().unsqueeze(0)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x[0].clone()

    def all_to_all(self, x: Tensor) -> Tensor:
        return x.clone()

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return x.clone()

    def shift(self, xs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [x.clone() for x in xs]

    def start(self, kind: str, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        return getattr(self, kind)(x), lambda: None


def communicator_over(group: dist.ProcessGroup | None) -> MeasuredCommunicator:
    """The communicator of a mesh axis with this group, None or of one rank for no others."""
    if group is None or group.size() == 1:
        return SingleCommunicator()
    return ProcessGroupCommunicator(group)
