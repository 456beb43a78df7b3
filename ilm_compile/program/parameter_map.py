"""Parameters that a pass has made out of the model's own, and the way back.

Weights are initialised, saved and loaded under the names and shapes of the user's model. A pass
that merges, splits or reshapes parameters says in a `ParameterMap` how, both ways; everything that
holds full tensors by the model's names goes through these functions. Maps are applied in the order
in which the passes made them and undone in the opposite one, so a map may read what an earlier one
made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ilm_compile.errors import ProgramError

if TYPE_CHECKING:
    from ilm_compile.program.program import Variable

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ParameterMap:
    """`targets` stand in the program for `sources`, which it does not hold any more.

    forward: full source tensors by name to full target tensors by name, differentiable; backward:
    its inverse. `made_by` names the pass.
    """

    made_by: str
    sources: tuple[Variable, ...]
    targets: tuple[str, ...]
    forward: Callable[[Tensors], Tensors]
    backward: Callable[[Tensors], Tensors]

    def names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(source.name for source in self.sources)


def to_program(maps: Iterable[ParameterMap], full: Mapping[str, Tensor]) -> Tensors:
    """Return full tensors by the program's names from those by the model's."""
    tensors = dict(full)
    for each in maps:
        tensors.update(each.forward({name: tensors.pop(name) for name in each.names()}))
    return tensors


def to_model(maps: Sequence[ParameterMap], full: Mapping[str, Tensor]) -> Tensors:
    """Return full tensors by the model's names from those by the program's."""
    tensors = dict(full)
    for each in reversed(maps):
        if any(name in tensors for name in each.targets):
            tensors.update(each.backward({name: tensors.pop(name) for name in each.targets}))
    return tensors


def gradients_to_model(maps: Sequence[ParameterMap], gradients: Mapping[str, Tensor]) -> Tensors:
    """Return the gradients of the model's parameters from those of the program's.

    The chain rule through the maps, which must be linear: the gradient is taken where every source
    is zero. Targets without a gradient count as zero beside one that has one.
    """
    result = dict(gradients)
    for each in reversed(maps):
        given = {name: result.pop(name) for name in each.targets if name in result}
        if not given:
            continue
        like = next(iter(given.values()))
        points = {
            source.name: like.new_zeros(source.user_shape).requires_grad_()
            for source in each.sources
        }
        with torch.enable_grad():
            values = {name: v for name, v in each.forward(points).items() if name in given}
        found = torch.autograd.grad(
            list(values.values()), list(points.values()), [given[name] for name in values],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        result.update(zip(points, found, strict=True))
    return result


def model_variables(
    maps: Sequence[ParameterMap], variables: Mapping[str, Variable]
) -> dict[str, Variable]:
    """Return the variables of the user's model: `variables` with sources in place of targets."""
    result = dict(variables)
    for each in reversed(maps):
        found: dict[str, Variable] = {}
        for name, variable in result.items():
            if name == each.targets[0]:
                found.update((source.name, source) for source in each.sources)
            elif name not in each.targets:
                found[name] = variable
        result = found
    return result


def check_round_trip(maps: Sequence[ParameterMap], full: Mapping[str, Tensor]) -> None:
    """Raise `ProgramError` naming the pass whose backward does not undo its forward on `full`."""
    tensors = dict(full)
    for each in maps:
        sources = {name: tensors.pop(name) for name in each.names()}
        targets = each.forward(dict(sources))
        returned = each.backward(dict(targets))
        for name, value in sources.items():
            if name not in returned or not torch.equal(returned[name], value):
                raise ProgramError(
                    f"pass {each.made_by}: the way back of its parameter map does not give "
                    f"{name} as it was; backward must undo forward"
                )
        tensors.update(targets)
