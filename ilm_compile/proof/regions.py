"""Every distinct region of a program against the same region of the traced graph, in numbers.

See `ilm_compile.proof.pieces` for how the program is cut, `ilm_compile.proof.alike` for what one
proof serves. Each piece is given random values for its anchors and weights, a corner batch, and
random gradients for its outputs; its outputs, the gradients of its anchors and those of its weights
must be the traced piece's, on all ranks, in float64.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ilm_compile.program.layout import Sizes, layout_of
from ilm_compile.program.program import Program
from ilm_compile.proof.locate import Difference, first_difference
from ilm_compile.proof.numbers import (
    Run,
    Side,
    filled,
    gather,
    relative_error,
    run,
    weight_gradients,
)
from ilm_compile.proof.pieces import Anchor, Piece, extract

TINY = 1e-5  # of all gradients' norm: one that small may be zero in theory, and rounding in fact


@dataclass
class Found:
    """Relative errors of a piece: of its outputs, and of gradients, by what they belong to."""

    values: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    is_finite: bool = True  # what the traced piece gives: the proof of a piece of NaN is empty

    @property
    def largest(self) -> float:
        """The largest error of all; infinite where a number is not one."""
        errors = [*self.values.values(), *self.gradients.values()]
        return max((e if e == e else math.inf for e in errors), default=0.0)

    def worst(self) -> str:
        """What is furthest off, in words."""
        kinds = (("value of", self.values), ("gradient of", self.gradients))
        named = [(e if e == e else math.inf, f"{k} {n}") for k, d in kinds for n, e in d.items()]
        error, name = max(named)
        return f"{name} by {error:.1e}"


@dataclass(frozen=True, slots=True)
class Trial:
    """What a piece is run on. `tensors`: parameters and buffers, `inputs`: of one micro-batch."""

    traced: Program
    program: Program
    tensors: Callable[[str], Tensor | None]
    inputs: Mapping[str, Tensor]

    def compare(self, piece: Piece) -> Found:
        """Return how far `piece` is from what it stands for."""
        old, new = sides = self.sides(piece)
        tensors = self._tensors(old, new)
        theirs, found = self._runs(piece, sides, tensors, keep=False)
        result = Found(is_finite=_is_finite(theirs))
        for index, anchor in enumerate(piece.outputs):
            name = piece.names[index] if piece.names else anchor.origin.name
            result.values[name] = _output_error(
                anchor, theirs, found, index, (old.sizes, new.sizes)
            )
        expected = _input_gradients(piece, theirs, old.sizes)
        actual = _input_gradients(piece, found, new.sizes, True)
        weights = weight_gradients(old, theirs, tensors), weight_gradients(new, found, tensors)
        expected |= {name: parts[0] for name, parts in weights[0].items()}
        actual |= weights[1]
        floor = TINY * math.sqrt(sum(float(g.norm()) ** 2 for g in expected.values()))
        for name in {**expected, **actual}:
            right = expected.get(name)
            if right is None:
                right = torch.zeros_like(actual[name][0])
            parts = actual.get(name) or [torch.zeros_like(right)]
            result.gradients[name] = max(
                relative_error(part, right, max(floor, 1e-300)) for part in parts
            )
        return result

    def locate(self, piece: Piece, tolerance: float) -> Difference | None:
        """Return the first node of `piece` that differs, by running it again and keeping all."""
        sides = self.sides(piece)
        runs = self._runs(piece, sides, self._tensors(*sides), keep=True)
        return first_difference(*sides, *runs, tolerance=tolerance)

    def _runs(
        self, piece: Piece, sides: tuple[Side, Side], tensors: Mapping[str, Tensor], *, keep: bool
    ) -> tuple[Run, Run]:
        """Return what both graphs of `piece` make of the same values."""
        each = zip(
            sides, random_values(piece), self._seeds(piece), self._trained(piece), strict=True
        )
        theirs, ours = (
            run(side, tensors, {**self.inputs, **anchors}, seeds, trained=trained, keep=keep)
            for side, anchors, seeds, trained in each
        )
        return theirs, ours

    def sides(self, piece: Piece) -> tuple[Side, Side]:
        """Return both graphs of `piece`, to be run."""
        return (
            Side.of(self.traced, extract(self.traced, piece.traced)),
            Side.of(self.program, extract(self.program, piece.compiled)),
        )

    def _tensors(self, old: Side, new: Side) -> dict[str, Tensor]:
        """Return what the pieces use by the model's names, sources of parameter maps included."""
        names = [*old.attributes(), *new.attributes()]
        for each in reversed(new.program.parameter_maps):
            made_before = set(each.targets) <= set(self.traced.variables)
            if set(each.targets) & set(names) and not made_before:
                names = [n for n in names if n not in each.targets] + list(each.names())
        made = {name: self.tensors(name) for name in names if name in self.traced.variables}
        return {name: value for name, value in made.items() if value is not None}

    def _seeds(self, piece: Piece) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return the gradient that each output starts with in either graph.

        Where several values of the program are one of the traced graph, each gets its part.
        """
        counts: dict[str, int] = {}
        for anchor in piece.outputs:
            counts[anchor.origin.name] = counts.get(anchor.origin.name, 0) + 1
        theirs: list[Tensor | None] = []
        ours: list[Tensor | None] = []
        for anchor in piece.outputs:
            if not anchor.trained:
                theirs.append(None)
                ours.append(None)
                continue
            value = anchor.origin.meta["val"]
            is_loss = bool(piece.names)
            full = torch.ones_like(value, device="cpu", dtype=torch.float64)
            full = full if is_loss else _random(f"gradient of {anchor.origin.name}", value)
            theirs.append(full / counts[anchor.origin.name])
            ours.append(full / counts[anchor.origin.name])
        return theirs, ours

    def _trained(self, piece: Piece) -> tuple[set[str], set[str]]:
        ours = {a.node.name for a in piece.inputs if a.trained}
        wanted = {a.origin.name for a in piece.inputs if a.trained}
        return wanted & {n.name for n in piece.traced.inputs}, ours


def random_values(
    piece: Piece, *, round_to: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a random value for each anchor that `piece` takes, by its name in either graph."""
    origins = {anchor.node.name: anchor.origin for anchor in piece.inputs}
    nodes = {node.name: node for node in (*piece.traced.inputs, *origins.values())}
    values = {
        name: _random(name, node.meta["val"]).to(round_to).double() for name, node in nodes.items()
    }
    theirs = {node.name: values[node.name] for node in piece.traced.inputs}
    return theirs, {name: values[origin.name] for name, origin in origins.items()}


def _is_finite(theirs: Run) -> bool:
    """Whether no output is all of what is no number, and the loss, which comes first, is one."""
    parts = [part for each in theirs.outputs for part in each if part.numel()]
    return not any(bool(part.isnan().all()) for part in parts)


def _output_error(
    anchor: Anchor, theirs: Run, ours: Run, index: int, sizes: tuple[Sizes, Sizes]
) -> float:
    right = gather(theirs.outputs[index], layout_of(anchor.origin), sizes[0], "value")[0]
    wholes = gather(ours.outputs[index], layout_of(anchor.node), sizes[1], "value")
    return max(relative_error(whole, right) for whole in wholes)


def _input_gradients(
    piece: Piece, found: Run, sizes: Sizes, is_compiled: bool = False
) -> dict[str, Any]:
    """Return the gradients of the anchors by the names in the traced graph.

    Of the traced graph whole ones, of the compiled one once or on every rank.
    """
    result: dict[str, Any] = {}
    for anchor in piece.inputs:
        node = anchor.node if is_compiled else anchor.origin
        if not anchor.trained or node.name not in found.seen:
            continue
        seen = found.seen[node.name]
        parts = gather(filled(seen.gradients, seen.values), layout_of(node), sizes, "gradient")
        if not is_compiled:
            result[anchor.origin.name] = parts[0]
            continue
        before = result.get(anchor.origin.name)
        result[anchor.origin.name] = (
            parts if before is None else [a + b for a, b in _paired(before, parts)]
        )
    return result


def _paired(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    count = max(len(left), len(right))
    return [(left[i % len(left)], right[i % len(right)]) for i in range(count)]


def _random(name: str, like: Tensor) -> Tensor:
    """Return a value that its name determines, in float64."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)
