"""Messages between emulated pipeline ranks: the order of posting is all that matches them.

This is NCCL's rule, not gloo's: a tag would hide two swapped messages, which train wrongly there.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ilm_compile.errors import ScheduleError
from ilm_compile.runtime.p2p import Message

TIMEOUT_S = 60.0


class Mailroom:
    """All messages of a world, by (sender, receiver), in the order they were posted."""

    def __init__(self) -> None:
        self.posted: dict[tuple[int, int], list[list[Tensor]]] = defaultdict(list)
        self.requested: dict[tuple[int, int], int] = defaultdict(int)
        self.arrived = threading.Condition()
        self.is_closed = False

    def post(self, sender: int, receiver: int, tensors: list[Tensor]) -> None:
        """Add a message; never blocks."""
        with self.arrived:
            self.posted[sender, receiver].append(tensors)
            self.arrived.notify_all()

    def request(self, sender: int, receiver: int) -> int:
        """Return the number of the message that this receive stands for."""
        number = self.requested[sender, receiver]
        self.requested[sender, receiver] += 1
        return number

    def collect(self, sender: int, receiver: int, number: int) -> list[Tensor]:
        """Return message `number`, once it was posted. Raises `ScheduleError` if it never is."""
        line = self.posted[sender, receiver]
        with self.arrived:
            ready = self.arrived.wait_for(lambda: len(line) > number or self.is_closed, TIMEOUT_S)
        if not ready or len(line) <= number:
            raise ScheduleError(
                f"emulation: pipeline rank {receiver} waits for message {number} of rank {sender}, "
                "which was never sent"
            )
        return line[number]

    def close(self) -> None:
        """Release everyone who waits: a rank has failed."""
        with self.arrived:
            self.is_closed = True
            self.arrived.notify_all()


class _Receipt:
    """What a posted receive is waited by; copies the message into the receive's buffers."""

    def __init__(self, collect: Callable[[], list[Tensor]], buffers: list[Tensor]) -> None:
        self.collect, self.buffers = collect, buffers

    def wait(self) -> None:
        tensors = self.collect()
        shapes = [[tuple(t.shape) for t in group] for group in (tensors, self.buffers)]
        if shapes[0] != shapes[1]:
            raise ScheduleError(f"emulation: expected a message of {shapes[1]}, got {shapes[0]}")
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            buffer.copy_(tensor)


class MailroomChannel:
    """What the executor of one emulated rank has in place of its process group."""

    def __init__(self, mailroom: Mailroom, rank: int) -> None:
        self.mailroom, self.rank = mailroom, rank
        self.device = torch.device("cpu")
        self.bytes_sent = 0

    def transfer(self, messages: Sequence[Message]) -> Callable[[], None]:
        """Return a function that issues `messages`."""

        def issue() -> None:
            for message in messages:
                self._issue(message)

        return issue

    def finish(self) -> None:
        """Nothing is under way: posting is sending."""

    def _issue(self, message: Message) -> None:
        if not message.boundaries:
            return
        if message.is_send:
            tensors = [t.clone() for t in message.mailbox.take(message.microbatch)]
            self.mailroom.post(self.rank, message.peer, tensors)
            return
        buffers = [torch.empty(b.shape, dtype=b.dtype) for b in message.boundaries]
        number = self.mailroom.request(message.peer, self.rank)

        def collect() -> list[Tensor]:
            return self.mailroom.collect(message.peer, self.rank, number)

        message.mailbox.tensors[message.microbatch] = buffers
        message.mailbox.works[message.microbatch] = (_Receipt(collect, buffers),)
