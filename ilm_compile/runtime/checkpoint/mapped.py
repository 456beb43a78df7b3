"""Parameters that a pass has made of others: saved and loaded as those of the user's model.

They are not slices of the model's tensors, so they are gathered and mapped back whole, one group at
a time, by one rank. What an optimizer keeps per element is mapped like the weights, which is right
where a map only moves elements (merges, splits, reshapes, permutes); others are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ilm_compile.program.parameter_map import ParameterMap, to_model, to_program
from ilm_compile.program.program import Variable
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.parallel import Parallel
from ilm_compile.runtime.shard import Shard


@dataclass(frozen=True, slots=True)
class Mapped:
    """Maps that belong together. model: what the user has of it; program: the names it became."""

    maps: tuple[ParameterMap, ...]
    model: tuple[Variable, ...]
    program: tuple[str, ...]

    def to_model(self, full: dict[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors by the model's names from those by the program's."""
        return to_model(self.maps, full)

    def to_program(self, full: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse."""
        return to_program(self.maps, full)

    def moves_elements(self) -> bool:
        """Whether every element of the program is one of the model's, each once."""
        given, start = {}, 0
        for variable in self.model:
            count = torch.Size(variable.user_shape).numel()
            numbers = torch.arange(start, start + count, dtype=torch.float64)
            given[variable.name] = numbers.view(variable.user_shape)
            start += count
        made = self.to_program(given)
        found = torch.cat([made[name].flatten() for name in self.program])
        return torch.equal(found.sort().values, torch.arange(start, dtype=torch.float64))


def mapped_groups(parallel: Parallel) -> list[Mapped]:
    """The groups of a program; none where passes have left the parameters alone."""
    groups: list[list[ParameterMap]] = []
    for each in parallel.parameter_maps:
        names = {*each.names(), *each.targets}
        related = [g for g in groups if any(names & {*m.names(), *m.targets} for m in g)]
        groups = [g for g in groups if g not in related]
        groups.append([*(m for g in related for m in g), each])
    return [_group(maps) for maps in groups]


def _group(maps: list[ParameterMap]) -> Mapped:
    model: list[Variable] = []
    program: list[str] = []
    for each in maps:
        # A source that no earlier map has made is the user's own.
        model += [source for source in each.sources if source.name not in program]
        program = [name for name in program if name not in each.names()] + list(each.targets)
    return Mapped(tuple(maps), tuple(model), tuple(program))


def gather_mapped(
    parallel: Parallel, group: Mapped, pick: Callable[[Shard], Tensor]
) -> dict[str, Tensor]:
    """What `pick` gives of the group's parameters, whole and by the model's names, on one rank.

    Empty on the others. Collective over the ranks that hold the parameters.
    """
    mesh, parameters = parallel.mesh, parallel.parameters
    if mesh.pp.rank != holder(parallel, group):
        return {}
    full = {}
    for name in group.program:
        shard = parameters.shards[name]
        value = shard.full(pick(shard), mesh, parallel.communicators)
        full[name] = shard.variable.unpad(value.detach()).to("cpu", copy=True)
    if not mesh.is_first_replica:
        return {}
    return {name: value.contiguous() for name, value in group.to_model(full).items()}


def holder(parallel: Parallel, group: Mapped) -> int:
    """The pipeline rank that saves a group. Raises `CheckpointError` if none holds all of it."""
    ranks = {parallel.parameters.ranks[name][0] for name in group.program}
    if len(ranks) > 1:
        raise CheckpointError(
            f"checkpoint: pass {group.maps[0].made_by} made {list(group.program)} of "
            f"{[v.name for v in group.model]}, and they are on several pipeline stages; expected "
            "what is mapped together to be used together"
        )
    return ranks.pop()


def check_moves(groups: Sequence[Mapped]) -> None:
    """Raise `CheckpointError` naming a pass whose map computes with the parameters."""
    for group in groups:
        if not group.moves_elements():
            raise CheckpointError(
                f"checkpoint: pass {group.maps[0].made_by} computes with the elements of "
                f"{[v.name for v in group.model]}, so the optimizer's state cannot be kept under "
                "the model's names; save without optimizer, or train without this pass"
            )


def names_of(groups: Sequence[Mapped]) -> Iterator[tuple[str, Mapped]]:
    """Each name in the program with its group."""
    return ((name, group) for group in groups for name in group.program)
