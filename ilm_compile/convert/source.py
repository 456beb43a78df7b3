"""What can be read tensor by tensor and box by box."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ilm_compile.runtime.checkpoint.boxes import Box, Held, whole


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Source(Protocol):
    """Tensors by name, which need not be in memory. `where` names it in errors."""

    where: str

    def specs(self) -> Mapping[str, Spec]:
        """The tensors there are."""

    def read(self, name: str, box: Box) -> Tensor:
        """A part of one, on the CPU and of its own memory."""


class Aliased:
    """A source with second names for some of its tensors, as a model with tied weights has."""

    def __init__(self, source: Source, aliases: Mapping[str, str]) -> None:
        self.where = source.where
        self._source = source
        self._aliases = aliases

    def specs(self) -> Mapping[str, Spec]:
        specs = dict(self._source.specs())
        return specs | {a: specs[name] for a, name in self._aliases.items() if name in specs}

    def read(self, name: str, box: Box) -> Tensor:
        return self._source.read(self._aliases.get(name, name), box)


class Chosen:
    """Some of a source's tensors."""

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        self.where = source.where
        self._source = source
        self._names = names

    def specs(self) -> Mapping[str, Spec]:
        specs = self._source.specs()
        return {name: specs[name] for name in self._names}

    def read(self, name: str, box: Box) -> Tensor:
        return self._source.read(name, box)


def read_whole(source: Source, name: str) -> Tensor:
    """All of a tensor."""
    return source.read(name, whole(source.specs()[name].shape))


def assemble(
    spec: Spec, wanted: Box, pieces: Sequence[tuple[Held, Callable[[Box], Tensor]]]
) -> Tensor:
    """The elements `wanted` of a tensor that lies in several places.

    Each piece is what its place holds of the full tensor, and a function that reads a box there.
    """
    out = torch.empty(wanted.sizes, dtype=spec.dtype)
    for held, read in pieces:
        common = held.full.intersect(wanted)
        if common is not None:
            own = common.inside(held.full).after(held.own)
            common.inside(wanted).of(out).copy_(read(own))
    return out
