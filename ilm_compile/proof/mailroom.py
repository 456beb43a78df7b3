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
from ilm_compile.program.lowered import Boundary
from ilm_compile.proof.threads import Turn
from ilm_compile.runtime.p2p import Message

TIMEOUT_S = 600.0  # the rank that is waited for may compile its regions first


class Mailroom:
    """All messages of a world of `size` ranks, by (sender, receiver), in the order of posting.

    `turn`: a lock that the ranks may hold; who waits gives it up.
    """

    def __init__(self, size: int, turn: Turn | None = None) -> None:
        self.size = size
        self.posted: dict[tuple[int, int], list[list[Tensor]]] = defaultdict(list)
        self.requested: dict[tuple[int, int], int] = defaultdict(int)
        self.waiting: dict[int, tuple[int, int]] = {}  # receiver: (sender, number of the message)
        self.runs = [0] * size  # that each rank has come to the end of
        self.changed = threading.Condition(turn)
        self.closed_because = ""

    def post(self, sender: int, receiver: int, tensors: list[Tensor]) -> None:
        """Add a message; never blocks."""
        with self.changed:
            self.posted[sender, receiver].append(tensors)
            self.changed.notify_all()

    def request(self, sender: int, receiver: int) -> int:
        """Return the number of the message that this receive stands for."""
        number = self.requested[sender, receiver]
        self.requested[sender, receiver] += 1
        return number

    def collect(self, sender: int, receiver: int, number: int) -> list[Tensor]:
        """Return message `number`, once it was posted.

        Raises `ScheduleError` if it never can be: nobody is left who could send it.
        """
        with self.changed:
            self.waiting[receiver] = (sender, number)
            line = self.posted[sender, receiver]
            while len(line) <= number:
                if self.closed_because:
                    raise ScheduleError(self.closed_because)
                if self._is_stuck() or not self.changed.wait(TIMEOUT_S):
                    self.close(self._who_waits())
            del self.waiting[receiver]
            tensors, line[number] = line[number], []  # each is collected once
        return tensors

    def _is_stuck(self) -> bool:
        """Whether nobody is left who could send what the last of those who wait need.

        A rank that has come to the end of a run has sent all of it.
        """
        starving = self._starving()
        last = min(self.runs[rank] for rank in starving)
        return all(rank in starving for rank, runs in enumerate(self.runs) if runs <= last)

    def _starving(self) -> dict[int, tuple[int, int]]:
        """Those who wait for a message that was not sent."""
        return {
            receiver: (sender, number)
            for receiver, (sender, number) in self.waiting.items()
            if len(self.posted[sender, receiver]) <= number
        }

    def _who_waits(self) -> str:
        waits = [
            f"pipeline rank {receiver} waits for message {number} of rank {sender}"
            for receiver, (sender, number) in sorted(self._starving().items())
        ]
        return f"emulation: {' and '.join(waits)}, which was never sent"

    def finish(self, rank: int) -> None:
        """Say that `rank` has come to the end of a run, in which it sends nothing more."""
        with self.changed:
            self.runs[rank] += 1
            self.changed.notify_all()

    def check_empty(self) -> None:
        """Raise `ScheduleError` if a message was sent that nobody received."""
        for (sender, receiver), line in self.posted.items():
            if (left := len(line) - self.requested[sender, receiver]) > 0:
                raise ScheduleError(
                    f"emulation: {left} messages of pipeline rank {sender} to rank {receiver} were "
                    "never received"
                )

    def close(self, reason: str = "emulation: another rank has failed") -> None:
        """Release everyone who waits, with an error."""
        with self.changed:
            self.closed_because = reason
            self.changed.notify_all()


class _Receipt:
    """What a posted receive is waited by; copies the message into the receive's buffers."""

    def __init__(self, collect: Callable[[], list[Tensor]], buffers: list[Tensor]) -> None:
        self.collect, self.buffers = collect, buffers

    def wait(self) -> None:
        tensors = self.collect()
        _require_alike(tensors, self.buffers)
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            buffer.copy_(tensor)


def _require_alike(
    tensors: Sequence[Tensor], expected: Sequence[Tensor] | Sequence[Boundary]
) -> None:
    got, wanted = ([(tuple(x.shape), x.dtype) for x in group] for group in (tensors, expected))
    if got != wanted:
        raise ScheduleError(f"emulation: expected a message of {wanted}, got {got}")


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
        """End a run. Nothing is under way: posting is sending."""
        self.mailroom.finish(self.rank)

    def _issue(self, message: Message) -> None:
        if not message.boundaries:
            return
        if message.is_send:
            tensors = [t.clone() for t in message.mailbox.take(message.microbatch)]
            _require_alike(tensors, message.boundaries)
            self.mailroom.post(self.rank, message.peer, tensors)
            return
        # nan, so that a tensor that is used before it came is seen
        buffers = [torch.full(b.shape, torch.nan, dtype=b.dtype) for b in message.boundaries]
        number = self.mailroom.request(message.peer, self.rank)

        def collect() -> list[Tensor]:
            return self.mailroom.collect(message.peer, self.rank, number)

        message.mailbox.tensors[message.microbatch] = buffers
        message.mailbox.works[message.microbatch] = (_Receipt(collect, buffers),)
