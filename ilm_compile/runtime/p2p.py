"""Messages between pipeline stages, in the order of the schedule.

The messages between two computes of a rank are issued together, as the schedule check assumes.
Nothing is awaited before it is needed: a received tensor by the compute that uses it, a sent one
some transfers later, when it has long arrived and only its memory is to be given back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ilm_compile.program.lowered import Boundary

Works = Sequence[Any]  # dist.Work, or None for a message to oneself
MAX_TENSORS = 1024  # tensors per message, so that every tensor of a step has its own tag
_UNAWAITED = 4  # transfers whose sends may be under way


@dataclass(slots=True)
class Mailbox:
    """What stands ready, or is under way, for each micro-batch at one side of a stage."""

    num_microbatches: int
    tensors: list[list[Tensor]] = field(init=False)
    works: list[Works] = field(init=False)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.tensors = [[] for _ in range(self.num_microbatches)]
        self.works = [() for _ in range(self.num_microbatches)]

    def wait(self, microbatch: int) -> None:
        """Return once what was received for `microbatch` can be used."""
        for work in self.works[microbatch]:
            work.wait()
        self.works[microbatch] = ()

    def take(self, microbatch: int) -> list[Tensor]:
        """Hand the tensors out and forget them."""
        tensors = self.tensors[microbatch]
        self.tensors[microbatch] = []
        return tensors


@dataclass(frozen=True, slots=True)
class Message:
    """One send or receive of a schedule. peer: rank within the pipeline group."""

    mailbox: Mailbox
    microbatch: int
    peer: int
    tag: int
    boundaries: tuple[Boundary, ...]
    is_send: bool


class Channel(Protocol):
    """What carries the messages of one pipeline rank."""

    device: torch.device
    bytes_sent: int

    def transfer(self, messages: Sequence[Message]) -> Callable[[], None]:
        """A function that issues `messages` as one batch."""
        ...

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        ...


class ProcessGroupChannel:
    """This rank's side of the pipeline group: the sends under way and the bytes sent so far."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.bytes_sent = 0
        self._under_way: deque[tuple[Works, list[Tensor]]] = deque()

    def transfer(self, messages: Sequence[Message]) -> Callable[[], None]:
        """A function that issues `messages` as one batch."""
        messages = [message for message in messages if message.boundaries]
        num_bytes = sum(
            boundary.dtype.itemsize * torch.Size(boundary.shape).numel()
            for message in messages
            if message.is_send
            for boundary in message.boundaries
        )

        def issue() -> None:
            self._issue(messages)
            self.bytes_sent += num_bytes

        return issue if messages else _nothing

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        while self._under_way:
            self._await_oldest()

    def _issue(self, messages: Sequence[Message]) -> None:
        operations, sent = [], []
        for message in messages:
            if message.is_send:
                tensors = message.mailbox.take(message.microbatch)
                sent += tensors
            else:
                tensors = [
                    torch.empty(boundary.shape, dtype=boundary.dtype, device=self.device)
                    for boundary in message.boundaries
                ]
                message.mailbox.tensors[message.microbatch] = tensors
            function = dist.isend if message.is_send else dist.irecv
            for index, tensor in enumerate(tensors):
                operations.append(
                    dist.P2POp(
                        function,
                        tensor,
                        group=self.group,
                        tag=message.tag + index,
                        group_peer=message.peer,
                    )
                )
        works: Works = dist.batch_isend_irecv(operations)
        is_coalesced = len(works) != len(operations)  # NCCL: one work for the batch
        start = 0
        for message in messages:
            stop = start + len(message.boundaries)
            own = works if is_coalesced else works[start:stop]
            if message.is_send:
                self._under_way.append((own, sent))
            else:
                message.mailbox.works[message.microbatch] = own
            start = stop
        while len(self._under_way) > _UNAWAITED:
            self._await_oldest()

    def _await_oldest(self) -> None:
        works, _ = self._under_way.popleft()
        for work in works:
            work.wait()


def _nothing() -> None:
    """A message without tensors."""
