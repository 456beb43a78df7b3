"""A collective of a bound graph in two halves, for what runs other calls between them.

``start`` sends and returns at once, `wait` makes what it returned readable. It has that in memory
which is written meanwhile and reads memory that must not be, so both are given to `wait`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ilm_compile.program.bound import fresh, real
from ilm_compile.program.collectives import Wire, wire_of
from ilm_compile.program.communicator import Communicator, ShapeCommunicator
from ilm_compile.program.placement import Placement

_ENDS = "Tensor x, str src, str dst, str axis, bool backward"
torch.library.define("ilm::start", f"({_ENDS}) -> Tensor")
torch.library.define("ilm::wait", "(Tensor(a!) received, Tensor x) -> ()")
torch.library.define("ilm::unpacked", f"({_ENDS}) -> Tensor")

# What waits, by where the result is: in each thread, for a proof's ranks have one each. A backward
# has a thread of its own, and waits there for what it has started there.
_thread = threading.local()


def _wire(
    src: str, dst: str, axis: str, backward: bool, comm: Communicator
) -> tuple[Wire, tuple[Communicator, Placement, Placement]]:
    ends = Placement.parse(src), Placement.parse(dst)
    wire = wire_of(*ends, backward=backward)
    assert wire is not None, f"{src} -> {dst} on {axis} is not one collective"
    return wire, (comm, *(reversed(ends) if backward else ends))


def _start(x: Tensor, src: str, dst: str, axis: str, backward: bool) -> Tensor:
    wire, given = _wire(src, dst, axis, backward, real(axis))
    received, wait = given[0].start(wire.kind, wire.pack(x, *given))
    _waits()[received.data_ptr()] = wait  # whoever had this address before has waited, or failed
    return received


def _wait(received: Tensor, x: Tensor) -> None:
    if received.numel():  # all empty ones have the same address
        _waits().pop(received.data_ptr())()


def _unpacked(x: Tensor, src: str, dst: str, axis: str, backward: bool) -> Tensor:
    wire, given = _wire(src, dst, axis, backward, real(axis))
    return fresh(wire.unpack(x, *given), x)


def _start_fake(x: Tensor, src: str, dst: str, axis: str, backward: bool) -> Tensor:
    shapes = ShapeCommunicator(real(axis).size)
    wire, given = _wire(src, dst, axis, backward, shapes)
    return x.new_empty(shapes.start(wire.kind, wire.pack(x, *given))[0].shape)


def _unpacked_fake(x: Tensor, src: str, dst: str, axis: str, backward: bool) -> Tensor:
    wire, given = _wire(src, dst, axis, backward, ShapeCommunicator(real(axis).size))
    return x.new_empty(wire.unpack(x, *given).shape)


def _waits() -> dict[int, Callable[[], None]]:
    if not hasattr(_thread, "waits"):
        _thread.waits = {}
    waits: dict[int, Callable[[], None]] = _thread.waits
    return waits


for name, run, fake in (
    ("ilm::start", _start, _start_fake),
    ("ilm::wait", _wait, lambda received, x: None),
    ("ilm::unpacked", _unpacked, _unpacked_fake),
):
    torch.library.impl(name, ("cpu", "cuda"), run)
    torch.library.register_fake(name, fake)

HALVES = (
    torch.ops.ilm.start.default,
    torch.ops.ilm.wait.default,
    torch.ops.ilm.unpacked.default,
)
