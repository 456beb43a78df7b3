"""What a forward pass keeps for its backward, asked of autograd itself, call by call.

Each distinct call of a graph is run once on tensors without data, and what autograd packs is looked
at: an input, a result, or memory of the call's own. There is no table of ops to keep. Memory that
several calls save, or views of it, counts once; inputs and parameters, those that a stage is given
cast among them, are alive anyway and do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ilm_compile.ops.nodes import tensor_bytes
from ilm_compile.program.communicator import shape_communicators
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.program import Program, Region
from ilm_compile.program.read_as import cast_weights
from ilm_compile.program.remade import AGAIN, NEEDED
from ilm_compile.program.values import is_tuple, tensors_of

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides and dtype of a tensor

_GETITEM = "getitem"
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Storage:
    """Memory that is alive between forward and backward.

    place: which result of `node` it is, or below 0 what the call made for itself.
    """

    node: fx.Node
    place: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Trial:
    """What a call saves: inputs and results by number, and bytes of its own.

    views: for each result the input of whose memory it is, or None. forms: of the results.
    """

    inputs: tuple[int, ...]
    results: tuple[int, ...]
    own: tuple[int, ...]
    views: tuple[int | None, ...]
    forms: tuple[Form, ...]


class SavedMemory:
    """What each call of `program` saves, of one micro-batch on one rank.

    As autograd does it on a CPU, whose attention saves what the flash kernels of a GPU do.
    """

    def __init__(self, program: Program) -> None:
        self._differentiable = gradient_nodes(program.graph)
        self._weights = cast_weights(program)
        self._sources: dict[tuple[fx.Node, int], tuple[fx.Node, int]] = {}
        self._trials: dict[Hashable, _Trial] = {}
        # As the calls give them: strides, which decide what is copied, differ without a device.
        self._forms: dict[fx.Node, tuple[Form, ...]] = {}
        self._of: dict[fx.Node, tuple[Storage, ...]] = {}
        with shape_communicators(program.plan.axes):
            for node in program.calls():
                self._of[node] = tuple(self._saved(node))

    def of(self, calls: Iterable[fx.Node]) -> dict[Storage, None]:
        """Return what these calls save together, in order, nothing being computed again."""
        return {storage: None for node in calls for storage in self._of[node]}

    def kept_by(self, calls: Sequence[fx.Node], region: Region) -> dict[Storage, None]:
        """Return what these calls of a region keep, as it and they are marked."""
        if region.recompute:
            return self.inputs_of(calls)
        return self.kept(calls, {n: n.meta[AGAIN] for n in calls if AGAIN in n.meta})

    def kept(self, calls: Sequence[fx.Node], again: Mapping[fx.Node, str]) -> dict[Storage, None]:
        """Return what these calls keep if those in `again` run again, with their marks."""
        made = {s for node, mark in again.items() if mark == NEEDED for s in self.storages(node)}
        given = self.inputs_of(again)
        return {s: None for s in (*self.of(calls), *given) if s not in made}

    def inputs_of(self, calls: Iterable[fx.Node]) -> dict[Storage, None]:
        """Return what these calls are given by others: what a recompute of them keeps."""
        inside = set(calls)
        given = (n for node in inside for n in node.all_input_nodes if n not in inside)
        return {s: None for n in given for s in self.storages(n)}

    def _saved(self, node: fx.Node) -> Iterator[Storage]:
        inputs = node.all_input_nodes
        if getattr(node.target, "__name__", "") == _GETITEM and is_tuple(inputs[0]):
            place = int(node.args[1])  # type: ignore[arg-type]
            self._sources[node, 0] = (inputs[0], place)
            self._forms[node] = (self._forms_of(inputs[0])[place],)
            return
        trial = self._trial(node)
        self._forms[node] = trial.forms
        for place, source in enumerate(trial.views):
            if source is not None:
                self._sources[node, place] = (inputs[source], 0)
        for number in trial.inputs:
            yield from self.storages(inputs[number])
        for place in trial.results:
            yield from self._storage(node, place)
        yield from (Storage(node, -1 - place, size) for place, size in enumerate(trial.own))

    def storages(self, node: fx.Node) -> Iterator[Storage]:
        """Yield the memory that the results of `node` lie in, but what is alive anyway."""
        for place in range(len(tensors_of(node.meta.get("val")))):
            yield from self._storage(node, place)

    def _storage(self, node: fx.Node, place: int) -> Iterator[Storage]:
        """Yield the memory of one result, unless it is alive anyway."""
        while (node, place) in self._sources:
            node, place = self._sources[node, place]
        if node.op == "call_function" and node not in self._weights:
            yield Storage(node, place, tensor_bytes(tensors_of(node.meta["val"])[place]))

    def _trial(self, node: fx.Node) -> _Trial:
        key = self.key(node)
        if key not in self._trials:
            self._trials[key] = _try(node, self)
        return self._trials[key]

    def stand_ins(self, node: fx.Node) -> list[Any]:
        """Return what a call is given, without data."""
        return [
            _stand_in(source, self._forms_of(source), source in self._differentiable)
            for source in node.all_input_nodes
        ]

    def is_differentiable(self, node: fx.Node) -> bool:
        """Whether a gradient flows through `node`."""
        return node in self._differentiable

    def _forms_of(self, node: fx.Node) -> tuple[Form, ...]:
        return self._forms.get(node) or tuple(map(_form, tensors_of(node.meta.get("val"))))

    def key(self, node: fx.Node) -> Hashable:
        """Return all that a trial depends on."""
        numbers = {n: i for i, n in enumerate(node.all_input_nodes)}

        def described(n: fx.Node) -> str:
            return f"<{numbers[n]} {self._forms_of(n)} {n in self._differentiable}>"

        arguments = fx.node.map_arg((node.args, node.kwargs), described)
        return node.target, repr(arguments), node in self._differentiable


def prepare(node: fx.Node, memory: SavedMemory) -> tuple[list[Any], Callable[[], Any]]:
    """Return stand-ins for the inputs of a call, and what runs it on them."""
    inputs = memory.stand_ins(node)
    by_node = dict(zip(node.all_input_nodes, inputs, strict=True))
    given: Any = (node.args, node.kwargs)
    args, kwargs = fx.node.map_aggregate(given, lambda v: _on_cpu(by_node.get(v, v)))  # type: ignore[arg-type]
    target: Any = node.target
    return inputs, lambda: target(*args, **kwargs)


def _try(node: fx.Node, memory: SavedMemory) -> _Trial:
    """Run the call on tensors without data and look at what is saved."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs, call = prepare(node, memory)
        packed: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            packed.append(tensor)
            return tensor

        with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
            results = tensors_of(call())
        numbers = {address(value): i for i, value in enumerate(inputs) if isinstance(value, Tensor)}
        places = {address(value): i for i, value in enumerate(results)}
        saved = {address(tensor): tensor for tensor in packed if memory.is_differentiable(node)}
        return _Trial(
            inputs=tuple(numbers[m] for m in saved if m in numbers),
            results=tuple(places[m] for m in saved if m in places and m not in numbers),
            own=tuple(
                tensor.untyped_storage().nbytes()
                for m, tensor in saved.items()
                if m not in numbers and m not in places
            ),
            views=tuple(numbers.get(address(value)) for value in results),
            forms=tuple(map(_form, results)),
        )


def _form(tensor: Tensor) -> Form:
    return tensor.shape, tensor.stride(), tensor.dtype


def _stand_in(node: fx.Node, forms: tuple[Form, ...], is_differentiable: bool) -> Any:
    """Return what a node holds, without data."""
    found = [
        torch.empty_strided(shape, strides, dtype=dtype).requires_grad_(
            is_differentiable and dtype.is_floating_point
        )
        for shape, strides, dtype in forms
    ]
    return tuple(found) if is_tuple(node) else found[0] if found else node.meta.get("val")


def _on_cpu(value: Any) -> Any:
    return _CPU if isinstance(value, torch.device) else value


def address(tensor: Tensor) -> int:
    """Return what tells the memory of a tensor from that of others, while it lives."""
    return int(tensor.untyped_storage()._cdata)
