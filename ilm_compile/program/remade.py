"""A region that gives back part of what autograd would keep, and makes it again in backward.

The calls that run again are marked in ``node.meta["again"]``: those of value `NEEDED` make what the
backward asks for, those `ON_THE_WAY` lead there. All that they start from is kept. Autograd saves
as always; of a tensor that will be made again only the shape is noted, and the first one that the
backward asks for runs the marked calls, once. No other call of the region runs twice: no product,
no collective, nothing that draws random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

AGAIN, NEEDED, ON_THE_WAY = "again", "needed", "on the way"
_running: ContextVar[_Tape | None]
_Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class Remade(nn.Module):
    """Runs `body`, whose graph has marked calls, and `again`, those calls alone, in backward."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.again = _split(body)
        self.body = body

    def forward(self, *args: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return self.body(*args)
        tape = _Tape(self.again)
        token = _running.set(tape)
        try:
            with saved_tensors_hooks(tape.pack, tape.unpack):
                result = self.body(*args)
        finally:
            _running.reset(token)
        tape.close()
        return result


def note(value: Tensor, number: int) -> None:
    """Tell the region that runs that `value` is the result `number` of what it can do again."""
    if (tape := _running.get()) is not None:
        tape.note(value, number)


def keep(*values: Tensor) -> None:
    """Give the region that runs what its second run starts from."""
    if (tape := _running.get()) is not None:
        tape.given = [*map(tape.pack, values)]


NOTES = (note, keep)  # they are no part of what a region computes


@dataclass(frozen=True, slots=True)
class _View:
    """Stands for a saved tensor that is made again."""

    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(slots=True, eq=False)
class _Saved:
    """A saved tensor: itself, what an outer hook made of it, or how it is found again."""

    value: Any


@dataclass(slots=True, eq=False)
class _Tape:
    """What one forward of a region leaves for its backward.

    places: of the storages that are made again, by address; whole: what is kept as far as is known,
    for an op saves its result before anybody can say that it is made again.
    """

    again: nn.Module
    given: list[_Saved] = field(default_factory=list)
    places: dict[int, tuple[int, StorageWeakRef]] = field(default_factory=dict)
    whole: dict[int, list[_Saved]] = field(default_factory=dict)
    views: dict[int, int] = field(default_factory=dict)  # by number, those not asked for yet
    made: dict[int, Tensor] | None = None
    outer: _Hooks | None = None

    def __post_init__(self) -> None:
        self.outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def note(self, value: Tensor, number: int) -> None:
        # A weak reference: the memory may go, and its address means nothing else while this lives.
        storage = value.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.places[storage._cdata] = number, reference
        for saved in self.whole.get(storage._cdata, ()):
            saved.value = self._view_of(saved.value, number)

    def pack(self, tensor: Tensor) -> _Saved:
        address = tensor.untyped_storage()._cdata
        # Without its history, which would hold this tape in a circle.
        saved = _Saved(tensor.detach())
        if address in self.places:
            saved.value = self._view_of(saved.value, self.places[address][0])
        if isinstance(saved.value, Tensor):
            self.whole.setdefault(address, []).append(saved)
        return saved

    def _view_of(self, tensor: Tensor, number: int) -> Tensor | _View:
        if tensor.is_conj() or tensor.is_neg():
            return tensor  # which no other view of its memory can stand for
        self.views[number] = self.views.get(number, 0) + 1
        offset = int(tensor.storage_offset())
        return _View(number, tensor.size(), tensor.stride(), offset, tensor.dtype)

    def close(self) -> None:
        """The forward is over: what is whole is kept, by whoever else has hooks."""
        for saved in (each for group in self.whole.values() for each in group):
            if self.outer is not None and isinstance(saved.value, Tensor):
                saved.value = self.outer[0](saved.value)
        self.places, self.whole = {}, {}

    def unpack(self, saved: _Saved) -> Tensor:
        if isinstance(saved.value, _View):
            return self.view(saved.value)
        found: Tensor = saved.value if self.outer is None else self.outer[1](saved.value)
        return found

    def view(self, wanted: _View) -> Tensor:
        """Return a tensor that was not kept; its memory goes with the last that asks for it."""
        if self.made is None:
            given, self.given = [self.unpack(each) for each in self.given], []
            with torch.no_grad():
                results = self.again(*given)
            self.made = {n: value for n, value in enumerate(results) if n in self.views}
        self.views[wanted.number] -= 1
        take = self.made.__getitem__ if self.views[wanted.number] else self.made.pop
        storage = take(wanted.number).untyped_storage()
        empty = torch.empty(0, dtype=wanted.dtype, device=storage.device)
        with torch.no_grad():
            return empty.set_(storage, wanted.offset, wanted.size, wanted.stride)


_running = ContextVar("running", default=None)


def _split(body: fx.GraphModule) -> fx.GraphModule:
    """Return the marked calls of `body` as a module of their own; `body` notes what they need."""
    graph = fx.Graph()
    marked = [node for node in body.graph.nodes if AGAIN in node.meta]
    given = {
        source: None for node in marked for source in node.all_input_nodes if source not in marked
    }
    values: dict[fx.Node, fx.Node] = {}
    for node in given:
        values[node] = graph.placeholder(node.name)
        values[node].meta.update(node.meta)
    for node in marked:
        values[node] = graph.node_copy(node, values.__getitem__)
    needed = [node for node in marked if node.meta[AGAIN] == NEEDED]
    graph.output(tuple(values[node] for node in needed))
    for number, node in enumerate(needed):
        with body.graph.inserting_after(node):
            body.graph.call_function(note, (node, number))
    with body.graph.inserting_before(body.graph.output_node()):
        body.graph.call_function(keep, tuple(given))
    body.recompile()
    return fx.GraphModule(nn.Module(), graph, "Again")
