"""What one step of a rank does, seen from outside: bytes of live tensors, and bytes it sends.

`Observer` watches every torch op of its process, the collectives included. That is slow, so a step
that is observed is not a step that is timed.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ilm_compile.program.traffic import Traffic, sent_bytes
from ilm_compile.runtime.communicator import ProcessGroupCommunicator

c10d = torch.ops.c10d

# Collective -> its kind, where its process group stands, and where the full tensor of `sent_bytes`.
_COLLECTIVES: dict[Any, tuple[str, int, int]] = {
    c10d.allreduce_.default: ("all_reduce", 1, 0),
    c10d._allgather_base_.default: ("all_gather", 2, 0),
    c10d._reduce_scatter_base_.default: ("reduce_scatter", 2, 1),
    c10d.alltoall_base_.default: ("all_to_all", 2, 1),
    c10d.broadcast_.default: ("broadcast", 1, 0),
    c10d.send.default: ("p2p", 1, 0),
}


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context manager. After it:

    peak_bytes: the most bytes of tensors alive at the end of any op. Tensors that stood before are
    counted too: parameters, gradients, optimizer state. What an op allocates and frees inside
    itself is not seen.
    sent: what this rank sent, by kind of collective, in the bytes of `sent_bytes`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self.sent: dict[str, Traffic] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._inside = 0  # ops of ours, whose own calls a mode does not see
        self._patch: Any = None

    def __enter__(self) -> Observer:
        gc.collect()
        for thing in gc.get_objects():
            self._watch(thing)
        self._patch = mock.patch.object(ProcessGroupCommunicator, "_call", self._seen_call())
        self._patch.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def _seen_call(self) -> Callable[..., None]:
        """A collective that is watched inside an op too."""
        original = ProcessGroupCommunicator._call

        def call(communicator: ProcessGroupCommunicator, *args: Any) -> None:
            if not self._inside:
                return original(communicator, *args)
            inside, self._inside = self._inside, 0
            super(Observer, self).__enter__()  # type: ignore[no-untyped-call]
            try:
                original(communicator, *args)
            finally:
                super(Observer, self).__exit__(None, None, None)
                self._inside = inside

        return call

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        is_ours = func.namespace == "ilm"
        self._inside += is_ours
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self._inside -= is_ours
        if func in _COLLECTIVES:
            self._count(*_COLLECTIVES[func], args)
        for thing in tree_leaves(result):
            self._watch(thing)
        self.peak_bytes = max(self.peak_bytes, self._live_bytes())
        return result

    def _watch(self, thing: object) -> None:
        # Not the compiler's fake tensors, nor DTensors: their local tensors are seen themselves.
        if type(thing) not in (Tensor, nn.Parameter):
            return
        assert isinstance(thing, Tensor)
        if thing.is_meta:
            return
        storage = thing.untyped_storage()
        self._alive[id(storage)] = weakref.ref(storage)

    def _live_bytes(self) -> int:
        # Summed anew every time: FSDP frees memory by resizing storages that stay alive.
        total, dead = 0, []
        for key, reference in self._alive.items():
            storage = reference()
            if storage is None:
                dead.append(key)
            else:
                total += storage.nbytes()
        for key in dead:
            del self._alive[key]
        return total

    def _count(self, kind: str, group: int, full: int, args: tuple[Any, ...]) -> None:
        size = dist.ProcessGroup.unbox(args[group]).size()
        num_bytes = sum(tensor.nbytes for tensor in tree_leaves(args[full]))
        if kind == "all_to_all":
            num_bytes *= size
        self.sent.setdefault(kind, Traffic()).add(sent_bytes(kind, num_bytes, size))
