"""What part of a stage holds while it runs forward and backward, from calls that were tried alone.

Each distinct call is run once on tensors without data, forward and backward, and what is alive then
is counted. A part is put together from its calls: values live until their last use or as long as a
backward needs them, gradients until the call that made their value has used them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ilm_compile.cost.saved import SavedMemory, Storage, address, prepare
from ilm_compile.ops.nodes import value_bytes
from ilm_compile.ops.products import operands
from ilm_compile.ops.spec import spec_of
from ilm_compile.program.alive import AliveBytes
from ilm_compile.program.communicator import shape_communicators
from ilm_compile.program.gradients import wanted_gradients
from ilm_compile.program.program import Program
from ilm_compile.program.values import tensors_of
from ilm_compile.schedule.memory import Held


class _Work(NamedTuple):
    """The most bytes that a call makes at once, forward and backward, and gradients by input.

    A gradient is its bytes, -1 - k if it lies in the memory of that of result k, or None.
    """

    forward: int
    backward: int = 0
    gradients: tuple[int | None, ...] = ()


@dataclass(slots=True, eq=False)
class _Gradient:
    size: int
    holders: int = 1


class _Part(NamedTuple):
    """What a product leaves: where its input lies, a gradient, and the bytes of the weight's."""

    values: tuple[Storage, ...]
    gradient: _Gradient
    weight: int


class Holding:
    """What parts of `program` hold, of one micro-batch on one rank. memory: of the same program.

    splits: products will leave the gradients of their weights, but are not marked yet.
    """

    def __init__(self, program: Program, memory: SavedMemory, *, splits: bool = False) -> None:
        self._splits = splits
        self._memory, self._axes = memory, program.plan.axes
        self._wanted = wanted_gradients(program.graph)
        self._loss = program.outputs[0]
        self._known: dict[Hashable, _Work] = {}

    def of(
        self,
        nodes: Sequence[fx.Node],
        kept: Collection[Storage],
        counted: Collection[Storage] = (),
    ) -> Held:
        """Return what these calls hold that keep `kept`, and make again what they save else.

        counted: what is kept by parts before, and not counted again.
        """
        with shape_communicators(self._axes):
            saved = self._memory.of(nodes)
            again = {s for s in saved if s not in kept}
            stays = sum(s.num_bytes for s in kept if s not in counted)
            forward = self._forward(nodes, kept, counted)
            alive = {s for s in {*kept, *again} if s not in counted}
            repeated = self._forward(nodes, again, {*kept, *counted}) if again else 0
            backward, left, weight = self._backward(nodes, alive)
            return Held(
                forward=forward,
                kept=stays,
                backward=max(backward, stays + repeated),
                left=left,
                weight=weight,
            )

    def _forward(
        self, nodes: Sequence[fx.Node], kept: Collection[Storage], counted: Collection[Storage]
    ) -> int:
        inside, last = set(nodes), dict[Storage, int]()
        stays: set[Storage] = {*kept, *counted}
        for place, node in enumerate(nodes):
            results = [*self._memory.storages(node)]
            inputs = (s for source in node.all_input_nodes for s in self._memory.storages(source))
            last |= dict.fromkeys((*results, *inputs), place)
            if not inside.issuperset(node.users):
                stays.update(results)
        ends: dict[int, list[Storage]] = defaultdict(list)
        for storage, place in last.items():
            if storage.node in inside and storage not in stays:
                ends[place].append(storage)
        now = sum(s.num_bytes for s in kept if s.node not in inside and s not in counted)
        most = now
        for place, node in enumerate(nodes):
            most = max(most, now + self._work(node).forward)
            own = (s for s in self._memory.of([node]) if s.place < 0 and s in kept)
            made = {*self._memory.storages(node), *own}
            now += sum(s.num_bytes for s in made if s.node is node and s not in counted)
            now -= sum(s.num_bytes for s in ends[place])
        return most

    def _backward(self, nodes: Sequence[fx.Node], alive: set[Storage]) -> tuple[int, int, int]:
        """Return the most at once, what is left for the weight part, and the most in that."""
        inside, first = set(nodes), dict[Storage, int]()  # who needs it last in backward
        for place, node in enumerate(nodes):
            for storage in self._memory.of([node]):
                first.setdefault(storage, place)
        freed: dict[int, list[Storage]] = defaultdict(list)
        for storage in alive:
            freed[first.get(storage, len(nodes) - 1)].append(storage)
        gradients: dict[tuple[fx.Node, int], _Gradient] = {}
        for node in nodes:
            if node in self._wanted and not inside.issuperset(self._readers(node)):
                # What comes from another stage is held by the runner until the end.
                holders = 1 + any(_stage(u) != _stage(node) for u in self._readers(node))
                gradients[node, 0] = _Gradient(value_bytes(node), holders)
        now = sum(s.num_bytes for s in alive) + sum(g.size for g in gradients.values())
        most, parts, left = now, list[_Part](), set[Storage]()
        for place, node in reversed([*enumerate(nodes)]):
            results = range(len(tensors_of(node.meta["val"])))
            own = {k: g for k in results if (g := gradients.pop((node, k), None)) is not None}
            if own:
                work = self._work(node)
                most = max(most, now + work.backward)
                now += self._pass_on(node, work, own, gradients)
            if own and self._leaves(node):
                value, weight = operands(node)
                values = tuple(self._memory.storages(value))
                parts.append(_Part(values, own[0], value_bytes(weight)))
                own[0].holders += 1
                left.update(values)
            for gradient in own.values():
                gradient.holders -= 1
                now -= gradient.size if not gradient.holders else 0
            now -= sum(s.num_bytes for s in freed[place] if s not in left)
        return most, *_weight_part(parts)

    def _leaves(self, node: fx.Node) -> bool:
        if not self._splits or not spec_of(node.target).weight_part:
            return bool(node.meta.get("leaves_weight"))
        _, weight = operands(node)
        return any(source.op == "get_attr" for source in (weight, *weight.all_input_nodes))

    def _readers(self, node: fx.Node) -> set[fx.Node]:
        """Whose gradients make up that of `node`: of the outputs, that of the loss alone."""
        is_loss = node is self._loss
        return {u for u in node.users if u in self._wanted or (is_loss and u.op == "output")}

    def _pass_on(
        self,
        node: fx.Node,
        work: _Work,
        own: dict[int, _Gradient],
        gradients: dict[tuple[fx.Node, int], _Gradient],
    ) -> int:
        """Give the inputs of a call their gradients, and return the bytes that are new."""
        new = 0
        for source, size in zip(node.all_input_nodes, work.gradients, strict=True):
            if size is None or source.op == "get_attr":
                continue  # of a parameter it is added to what is there
            key = source, int(node.args[1]) if node.target is getitem else 0  # type: ignore[arg-type]
            shared = own.get(-1 - size) if size < 0 else None
            before = gradients.get(key)
            if shared is None:
                gradients[key] = _Gradient(max(size, 0))
                new += max(size, 0)
            elif before is None:
                gradients[key] = shared
                shared.holders += 1
            elif before.holders > 1:  # the sum of two that others hold too
                gradients[key] = _Gradient(before.size)
                new += before.size
            if before is not None and gradients[key] is not before:  # added in the new one's memory
                before.holders -= 1
                new -= before.size if not before.holders else 0
        return new

    def _work(self, node: fx.Node) -> _Work:
        if node.target is getitem:
            return _Work(0, 0, (-1,))
        leaves = self._leaves(node)
        key = self._memory.key(node), leaves
        if key not in self._known:
            self._known[key] = _try(node, self._memory, leaves=leaves)
        return self._known[key]


def _weight_part(parts: Sequence[_Part]) -> tuple[int, int]:
    """Return what is left for a weight part, and the most at once while it runs, first to last."""
    last: dict[object, tuple[int, int]] = {}
    for place, part in enumerate(parts):
        last |= {value: (place, value.num_bytes) for value in part.values}
        last[part.gradient] = place, part.gradient.size
    now = most = left = sum(size for _, size in last.values())
    for place, part in enumerate(parts):
        most = max(most, now + part.weight)
        now -= sum(size for end, size in last.values() if end == place)
    return left, most


def _stage(node: fx.Node) -> object:
    return node.meta.get("stage")


def _try(node: fx.Node, memory: SavedMemory, *, leaves: bool) -> _Work:
    """Run the call forward and backward on tensors without data."""
    with FakeTensorMode(allow_non_fake_inputs=True), AliveBytes() as alive, torch.enable_grad():
        inputs, call = prepare(node, memory)
        if leaves:
            _, weight = operands(node)
            inputs[node.all_input_nodes.index(weight)].requires_grad_(False)
        tensors = [v for v in inputs if isinstance(v, Tensor)]
        alive.bytes = alive.peak = 0
        results = tensors_of(call())
        forward = alive.peak
        flowing = [k for k, result in enumerate(results) if result.requires_grad]
        wanted = [t for t in tensors if t.requires_grad]
        if not flowing or not wanted:
            return _Work(forward, 0, (None,) * len(inputs))
        given = [torch.empty_like(results[k]) for k in flowing]
        alive.peak = before = alive.bytes
        found = torch.autograd.grad([results[k] for k in flowing], wanted, given, allow_unused=True)
        places = {address(g): -1 - k for k, g in zip(flowing, given, strict=True)}
        by_input = dict(zip(map(id, wanted), found, strict=True))

        def size(value: Any) -> int | None:
            gradient = by_input.get(id(value))
            if gradient is None:
                return None
            return places.get(address(gradient), gradient.untyped_storage().nbytes())

        return _Work(forward, alive.peak - before, tuple(map(size, inputs)))
