"""All ranks of a compiled program in one process: training steps, schedule and all.

Every rank is a thread that runs what it would run in training: its own `Parallel` and `Trainer`
over its own copy of its stages, through the very schedule that would be launched, with the
runtime's hand-over, gradient sync, tied gradients, norm, clipping, AdamW and checkpoint slices.
Only what carries the messages is another: threads meet instead of processes. Data-parallel replicas
run one after the other and add up their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ilm_compile.errors import PlacementError, ProgramError
from ilm_compile.program.layout import Sizes
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.program.parameter_map import check_round_trip, gradients_to_model, to_model
from ilm_compile.program.placement import join_shards
from ilm_compile.program.program import Variable
from ilm_compile.proof import round_trip
from ilm_compile.proof.emulated_rank import EmulatedRank, Meetings
from ilm_compile.proof.threads import T, run_groups
from ilm_compile.runtime.batch import Batch
from ilm_compile.runtime.initial_values import tensors_of
from ilm_compile.runtime.shard import Shard
from ilm_compile.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Step:
    """One training step, everything whole and by the user's names.

    gradients: as they were added up, before clipping, of the parameters that got one. weights: of
    all parameters after AdamW. outputs: of the last stage but the loss, on the rows of the global
    batch, if they were asked for; one number per micro-batch where they have no rows. norm: of all
    gradients, as the ranks found it together; None where nothing asked them.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    norm: float | None = None


def emulate(
    lowered: LoweredProgram,
    schedule: Schedule,
    model: nn.Module | Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    dp: int = 1,
    max_norm: float | None = 1.0,
    keep_outputs: bool = False,
) -> list[Step]:
    """Return the optimizer steps of `lowered` on the global `batches`, one each.

    model: what the weights start from, a module or full tensors by the user's names (buffers that
    are constants of the graph may be absent); it is left as it is. max_norm: what gradients are
    clipped to, None for no clipping. After the first of several steps, weights and optimizer go
    through a checkpoint. Raises `ScheduleError` if a rank waits for a message that is
    never sent or gradients are not reduced in the last backward, `PlacementError` and
    `ProgramError` where ranks that must agree do not.
    """
    full = tensors_of(model) if isinstance(model, nn.Module) else dict(model)
    check_round_trip(lowered.parameter_maps, full)
    world = _World(lowered, schedule, model, dp, max_norm)
    steps = []
    for number, batch in enumerate(batches):
        if number == 1:
            world.reload()
        steps.append(world.step(batch, number, keep_outputs))
    return steps


class _World:
    """All ranks, with weights and optimizer state."""

    def __init__(
        self,
        lowered: LoweredProgram,
        schedule: Schedule,
        model: nn.Module | Mapping[str, Tensor],
        dp: int,
        max_norm: float | None,
    ) -> None:
        self.lowered = lowered
        self.meetings = meetings = Meetings(schedule.num_ranks, lowered.plan.axes)
        self.ranks = [
            [
                EmulatedRank(lowered, schedule, model, meetings, (p, r), dp=dp, max_norm=max_norm)
                for r in range(meetings.size)
            ]
            for p in range(meetings.pp)
        ]
        self._check_trained()

    def step(self, batch: Batch, number: int, keep_outputs: bool) -> Step:
        results = self._on_all(
            lambda rank: rank.forward_backward(batch, number, keep_outputs=keep_outputs)
        )
        for mailroom in self.meetings.mailrooms:
            mailroom.check_empty()
        gradients = self._whole("gradient", lambda shard: shard.gradient())
        norms = self._on_all(EmulatedRank.update)
        weights = self._whole("value", lambda shard: shard.local)
        maps = self.lowered.parameter_maps
        losses = [loss for group in results for loss, _ in group]
        outputs = [outputs for group in results for _, outputs in group if outputs]
        return Step(
            losses[0],
            gradients_to_model(maps, gradients),
            to_model(maps, weights),
            _agreed(outputs) if outputs else {},
            norms[0][0],
        )

    def reload(self) -> None:
        """Save all ranks, forget what was saved, and load it again."""
        trainer = self.ranks[0][0].trainer
        if trainer is None or not round_trip.can_be_kept(trainer.parallel):
            return
        saved = [each for group in self._on_all(EmulatedRank.save) for each in group]
        reader = round_trip.PieceReader(saved[0][1], [part for part, _ in saved])
        self._on_all(lambda rank: rank.load(reader))

    def _on_all(self, function: Callable[[EmulatedRank], T]) -> list[list[T]]:
        """Return what `function` gives on every rank's thread, by pipeline rank and number."""
        return run_groups(
            self.meetings.pp,
            self.meetings.meshes[0].sizes,
            lambda pp_rank, rank: function(self.ranks[pp_rank][rank]),
            meshes=self.meetings.meshes,
            turn=self.meetings.turn,
            on_failure=self.meetings.close,
        )

    def _held(self, variable: Variable) -> list[list[Shard]]:
        """What the ranks of each pipeline rank that holds `variable` have of it."""
        groups = ([r.parallel.parameters.shards for r in group] for group in self.ranks)
        return [
            [s[variable.name] for s in shards] for shards in groups if variable.name in shards[0]
        ]

    def _whole(self, kind: str, pick: Callable[[Shard], Tensor | None]) -> dict[str, Tensor]:
        """Return what `pick` gives of each parameter, joined, in memory of its own.

        Left out where it gives None on every rank.
        """
        found = {}
        for name, variable in self.lowered.variables.items():
            if not variable.is_parameter:
                continue
            copies = [[(s.local, pick(s)) for s in group] for group in self._held(variable)]
            if all(part is None for group in copies for _, part in group):
                continue
            wholes = [
                _joined(
                    [torch.zeros_like(x) if p is None else p for x, p in g],
                    variable,
                    self.meetings.meshes[0].sizes,
                    kind,
                )
                for g in copies
            ]
            if any(not torch.equal(wholes[0], other) for other in wholes[1:]):
                raise PlacementError(
                    f"emulation: the copies of the tied {name} on {len(wholes)} pipeline ranks "
                    f"differ in their {kind} after one step"
                )
            found[name] = variable.unpad(wholes[0].detach()).clone()
        return found

    def _check_trained(self) -> None:
        """Raise `ProgramError` if of a parameter on several stages not all copies are trained."""
        leaves: dict[str, list[Tensor]] = {}
        for group in self.ranks:
            for stage in group[0].parallel.stages:
                for name, path in stage.variables.items():
                    if self.lowered.variables[name].is_parameter:
                        leaves.setdefault(name, []).append(stage.module.get_parameter(path))
        for name, copies in leaves.items():
            frozen = [number for number, leaf in enumerate(copies, 1) if not leaf.requires_grad]
            if 0 < len(frozen) < len(copies):
                raise ProgramError(
                    f"emulation: {name} is held by {len(copies)} stages, and copy {frozen[0]} "
                    "gets no gradient; each copy of a tied parameter must get the sum of all "
                    "gradients"
                )


def _joined(parts: list[Tensor], variable: Variable, sizes: Sizes, kind: str) -> Tensor:
    """Return the full tensor of which the ranks hold `parts`, copies of each included."""
    for axis, size in reversed([*sizes.items()]):
        place = variable.layout.on(axis)
        groups = [parts[i : i + size] for i in range(0, len(parts), size)]
        if place.is_shard:
            parts = [join_shards(group, place) for group in groups]
            continue
        for group in groups:
            _require_equal(group, variable.name, kind, axis)
        parts = [group[0] for group in groups]
    return parts[0]


def _agreed(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the outputs that every rank has made whole, which must be the same."""
    for name in outputs[0]:
        _require_equal([each[name] for each in outputs], f"output {name}", "value", "mesh")
    return outputs[0]


def _require_equal(copies: list[Tensor], name: str, kind: str, axis: str) -> None:
    for rank, other in enumerate(copies):
        if not torch.allclose(other, copies[0], rtol=1e-9, atol=1e-12, equal_nan=True):
            raise PlacementError(
                f"emulation: {name} is invariant, but its {kind} differs between {axis} ranks "
                f"0 and {rank}: it is not fully reduced"
            )


def clip_coefficient(gradients: Mapping[str, Tensor], max_norm: float | None = 1.0) -> float:
    """Return the factor that scales `gradients` to a global norm of at most `max_norm`."""
    if max_norm is None or not gradients:
        return 1.0
    norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
    return min(1.0, max_norm / (float(norm) + 1e-6))
