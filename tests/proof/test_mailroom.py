"""Messages between emulated pipeline ranks."""

from __future__ import annotations

import threading

import pytest
import torch

from ilm_compile.errors import ScheduleError
from ilm_compile.program.lowered import Boundary
from ilm_compile.proof.mailroom import Mailroom, MailroomChannel
from ilm_compile.runtime.p2p import Mailbox, Message


def message(mailbox, peer, *, is_send, dtype=torch.float64, microbatch=0):
    boundaries = (Boundary("x", (2,), dtype, True),)
    return Message(mailbox, microbatch, peer, 0, boundaries, is_send)


def test_messages_are_matched_by_their_order_alone():
    room, sent, received = Mailroom(2), Mailbox(2), Mailbox(2)
    for microbatch in (1, 0):  # the sender's order
        sent.tensors[microbatch] = [torch.full((2,), float(microbatch), dtype=torch.float64)]
        MailroomChannel(room, 0).transfer([message(sent, 1, is_send=True, microbatch=microbatch)])()
    for microbatch in (0, 1):  # the receiver's
        MailroomChannel(room, 1).transfer(
            [message(received, 0, is_send=False, microbatch=microbatch)]
        )()
        received.wait(microbatch)
    assert [float(received.tensors[m][0][0]) for m in (0, 1)] == [1.0, 0.0]
    room.check_empty()


def test_a_received_tensor_is_a_copy():
    room, sent, received = Mailroom(2), Mailbox(1), Mailbox(1)
    tensor = torch.zeros(2, dtype=torch.float64)
    sent.tensors[0] = [tensor]
    MailroomChannel(room, 0).transfer([message(sent, 1, is_send=True)])()
    MailroomChannel(room, 1).transfer([message(received, 0, is_send=False)])()
    tensor.fill_(7)
    received.wait(0)
    assert received.tensors[0][0].eq(0).all()


def test_a_tensor_that_is_used_before_it_came_is_nan():
    room, received = Mailroom(2), Mailbox(1)
    MailroomChannel(room, 1).transfer([message(received, 0, is_send=False)])()
    assert received.tensors[0][0].isnan().all()


def test_a_message_of_another_dtype_is_refused():
    room, sent, received = Mailroom(2), Mailbox(1), Mailbox(1)
    sent.tensors[0] = [torch.zeros(2, dtype=torch.float32)]
    MailroomChannel(room, 0).transfer([message(sent, 1, is_send=True, dtype=torch.float32)])()
    MailroomChannel(room, 1).transfer([message(received, 0, is_send=False)])()
    with pytest.raises(ScheduleError, match=r"expected a message of .*float64.*, got .*float32"):
        received.wait(0)


def test_a_sent_message_must_be_what_the_boundary_says():
    sent = Mailbox(1)
    sent.tensors[0] = [torch.zeros(2, dtype=torch.float64)] * 2
    with pytest.raises(ScheduleError, match=r"of \[\(\(2,\), torch.float64\)\],"):
        MailroomChannel(Mailroom(2), 0).transfer([message(sent, 1, is_send=True)])()


def test_waiting_ends_when_everybody_waits():
    room = Mailroom(2)
    errors = []

    def wait(rank, other):
        try:
            room.collect(other, rank, 0)
        except ScheduleError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=wait, args=pair) for pair in ((0, 1), (1, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(errors) == 2
    assert all("which was never sent" in error for error in errors)


def test_waiting_ends_when_the_sender_has_finished():
    room = Mailroom(2)
    room.finish(0)
    with pytest.raises(ScheduleError, match="pipeline rank 1 waits for message 0 of rank 0"):
        room.collect(0, 1, 0)


def test_a_message_nobody_asked_for_is_refused():
    room = Mailroom(2)
    room.post(0, 1, [torch.zeros(1)])
    with pytest.raises(ScheduleError, match="1 messages of pipeline rank 0 to rank 1 were never"):
        room.check_empty()
