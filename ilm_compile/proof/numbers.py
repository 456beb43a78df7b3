"""Two graphs run on the same numbers and compared: values, and gradients of all that is trained.

A graph is a whole program or a piece of one. Full values go in and come out; between, every rank of
the mesh runs its part on a thread. What is split, and how it is put together again,
follows from the placements: a partial value is cut into random summands, and so is the gradient of
a replicated one.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.program.layout import Layout, Sizes, layout_of, sharded_over
from ilm_compile.program.parameter_map import gradients_to_model, to_program
from ilm_compile.program.placement import Placement, join_shards, split_shards
from ilm_compile.program.program import Program
from ilm_compile.proof.promote import float64_default
from ilm_compile.proof.threads import AxisGroups, run_ranks

Parts = list[Tensor]  # by rank
PARTIAL = {"value": "P", "gradient": "R"}  # the placement whose parts add up


@dataclass(frozen=True, slots=True)
class Seen:
    """A node's value and gradient on each rank; a gradient is None where none came."""

    values: Parts
    gradients: list[Tensor | None]


@dataclass(frozen=True, slots=True)
class Run:
    """What a run left: the seen nodes by name, and the outputs by position, on each rank."""

    seen: dict[str, Seen]
    outputs: list[Parts]


@dataclass(frozen=True, slots=True)
class Side:
    """A graph of `program`, all of it or a piece, that runs on a mesh of `sizes`."""

    program: Program
    graph: fx.GraphModule
    sizes: Sizes

    @property
    def size(self) -> int:
        """The number of ranks."""
        return prod(self.sizes.values())

    @classmethod
    def of(cls, program: Program, graph: fx.GraphModule | None = None) -> Side:
        """Return the side of a whole program, or of a piece that was cut out of it."""
        return cls(program, graph or program.graph_module, sizes_of(program))

    def placeholders(self) -> list[fx.Node]:
        """What the graph takes, in order."""
        return list(self.graph.graph.find_nodes(op="placeholder"))

    def results(self) -> list[fx.Node]:
        """What the graph returns."""
        found: Any = self.graph.graph.output_node().args[0]
        return list(found)

    def attributes(self) -> dict[str, fx.Node]:
        """The parameters and buffers that the graph uses, by name."""
        nodes = self.graph.graph.find_nodes(op="get_attr")
        return {str(node.target): node for node in nodes if node.users}


def sizes_of(program: Program) -> Sizes:
    """Return the mesh on which `program` runs: of one rank on each axis until it is sharded."""
    facts = program.facts
    return {a: n if sharded_over(a) in facts else 1 for a, n in program.plan.axes.items()}


def run(
    side: Side,
    tensors: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    seeds: Sequence[Tensor | None],
    *,
    trained: Collection[str] = (),
    keep: bool = True,
    in_own_dtypes: bool = False,
) -> Run:
    """Return what `side` makes of full `tensors` (by the model's names) and `inputs`.

    seeds: the full gradient that each output starts the backward with, None for none. trained:
    the inputs that want a gradient. keep: see every call, not inputs and parameters alone.
    in_own_dtypes: inputs are cast to what the graph says of them.
    """
    sizes, placeholders = side.sizes, side.placeholders()
    split = {
        node.name: scatter(inputs[str(node.target)], node, sizes, "value") for node in placeholders
    }
    starts = [
        None if seed is None else scatter(seed, node, sizes, "gradient")
        for seed, node in zip(seeds, side.results(), strict=True)
    ]
    held = _local_tensors(side, tensors)

    def rank(index: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        arguments = []
        for node in placeholders:
            value = split[node.name][index].detach().clone()
            value = value.to(node.meta["val"].dtype) if in_own_dtypes else value
            is_trained = str(node.target) in trained
            arguments.append(value.requires_grad_() if is_trained else value)
        own = {name: parts[index] for name, parts in held.items()}
        recorder = _Recorder(side.graph, own, keep)
        outputs = list(recorder.run(*arguments))
        recorder.seen.update(
            (node.name, value) for node, value in zip(placeholders, arguments, strict=True)
        )
        begun = [
            (output, start[index])
            for output, start in zip(outputs, starts, strict=True)
            if start is not None and output.requires_grad
        ]
        if begun:
            torch.autograd.backward([each for each, _ in begun], [seed for _, seed in begun])
        return recorder.seen, [output.detach() for output in outputs]

    with nullcontext() if in_own_dtypes else float64_default():
        ranks = run_ranks(sizes, rank)
    return Run(
        {
            name: Seen([s[name].detach() for s, _ in ranks], [s[name].grad for s, _ in ranks])
            for name in ranks[0][0]
        },
        [[outputs[i] for _, outputs in ranks] for i in range(len(starts))],
    )


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps values, and their gradients once the outputs were differentiated."""

    def __init__(self, graph: fx.GraphModule, tensors: Mapping[str, Tensor], keep: bool) -> None:
        super().__init__(graph, garbage_collect_values=not keep)
        self.tensors, self.keep = tensors, keep
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            value = self.seen[n.name] = self.tensors[str(n.target)]
            return value
        value = super().run_node(n)
        if self.keep and isinstance(value, Tensor) and n.op == "call_function":
            if value.requires_grad:
                value.retain_grad()
            self.seen[n.name] = value
        return value


def _local_tensors(side: Side, tensors: Mapping[str, Tensor]) -> dict[str, Parts]:
    """Return what each rank holds of every parameter and buffer that the graph uses."""
    program, wanted = side.program, side.attributes()
    maps = [
        each
        for each in program.parameter_maps
        if set(each.targets) & set(wanted) and set(each.names()) <= set(tensors)
    ]
    full = to_program(maps, tensors)
    mesh = AxisGroups(side.sizes)
    places = [mesh.place(rank) for rank in range(side.size)]
    held = {}
    for name in wanted:
        variable = program.variables[name]
        value = full.get(name)
        if value is None:  # a constant of the graph brings its value along
            value = dict(side.graph.named_buffers())[name]
        value = variable.pad(value.detach()) if variable.padding else value.detach()
        parts = [variable.layout.cut(value, place) for place in places]
        needs = variable.is_parameter and variable.requires_grad
        held[name] = [part.clone().requires_grad_(needs) for part in parts]
    return held


def weight_gradients(side: Side, found: Run, tensors: Mapping[str, Tensor]) -> dict[str, Parts]:
    """Return the full gradient of each trained parameter that `side` uses, by the model's names.

    Once, or as often as there are ranks where each must have it.
    """
    whole: list[dict[str, Tensor]] = [{} for _ in range(side.size)]
    for name, node in side.attributes().items():
        variable = side.program.variables[name]
        if not variable.is_parameter or not variable.requires_grad:
            continue
        seen = found.seen[node.name]
        parts = filled(seen.gradients, seen.values)
        wholes = gather(parts, variable.layout, side.sizes, "gradient")
        for index, gradients in enumerate(whole):
            gradients[name] = variable.unpad(wholes[index % len(wholes)])
    maps = side.program.parameter_maps
    named = [gradients_to_model(maps, gradients) for gradients in whole]
    return {name: [each[name] for each in named] for name in named[0]}


def filled(gradients: Sequence[Tensor | None], values: Parts) -> Parts:
    """Return `gradients` with zeros where none came."""
    pairs = zip(gradients, values, strict=True)
    return [torch.zeros_like(value) if grad is None else grad for grad, value in pairs]


def scatter(full: Tensor, node: fx.Node, sizes: Sizes, what: str) -> Parts:
    """Return each rank's part of a full value or gradient of `node`, the last axis fastest."""
    layout = layout_of(node)
    generator = torch.Generator().manual_seed(zlib.crc32(node.name.encode()))
    parts = [_padded(full, layout.global_shape(node.meta["val"].shape, sizes))]
    for axis, size in sizes.items():
        place = layout.on(axis)
        parts = [each for part in parts for each in _split(part, place, size, what, generator)]
    return parts


def _split(
    full: Tensor, place: Placement, size: int, what: str, generator: torch.Generator
) -> Parts:
    if place.is_shard:
        return split_shards(full, place, size)
    if place.kind != PARTIAL[what] or size == 1:
        return [full] * size
    parts = [
        torch.randn(full.shape, generator=generator, dtype=torch.float64).to(full.dtype)
        for _ in range(size - 1)
    ]
    return [*parts, full - torch.stack(parts).sum(0)]


def gather(parts: Parts, layout: Layout, sizes: Sizes, what: str) -> list[Tensor]:
    """Return the full value: once, or as often as there are ranks if each must have it."""
    found = [[part] for part in parts]  # of each rank so far: its value, or all that must be alike
    for axis, size in reversed([*sizes.items()]):
        place = layout.on(axis)
        groups = [found[i : i + size] for i in range(0, len(found), size)]
        found = [
            [
                whole
                for versions in zip(*group, strict=True)
                for whole in _join(list(versions), place, what)
            ]
            for group in groups
        ]
    return found[0]


def _join(parts: Parts, place: Placement, what: str) -> list[Tensor]:
    if place.is_shard:
        return [join_shards(parts, place)]
    return [torch.stack(parts).sum(0)] if place.kind == PARTIAL[what] else parts


def relative_error(actual: Tensor, expected: Tensor, floor: float = 1e-12) -> float:
    """Return how far `actual` is from `expected`, relative to its norm or to `floor`."""
    actual = without_padding(actual, expected)
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return float((actual != expected).any())
    actual, expected = actual.double(), expected.double()
    difference = actual - expected
    distance, scale = float(difference.norm()), float(expected.norm())
    if not isfinite(distance + scale):
        # where both are infinite or nothing, a mask say, they are equal
        same = (actual == expected) | (actual.isnan() & expected.isnan())
        distance = float(torch.where(same, 0.0, difference).norm())
        scale = float(expected[expected.isfinite()].norm())
    return distance / max(scale, floor)


def without_padding(actual: Tensor, expected: Tensor) -> Tensor:
    """Return `actual` without the classes that a padded vocabulary adds at the end."""
    if actual.dim() == expected.dim():
        for dim, size in enumerate(expected.shape):
            actual = actual.narrow(dim, 0, min(size, actual.shape[dim]))
    return actual


def _padded(full: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `full` with zeros up to `shape`, as a padded vocabulary has."""
    for dim, size in enumerate(shape):
        if size > full.shape[dim]:
            rest = list(full.shape)
            rest[dim] = size - full.shape[dim]
            full = torch.cat([full, full.new_zeros(rest)], dim)
    return full
