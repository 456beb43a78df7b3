"""One rank of an emulated world: the runtime's own `Parallel` and `Trainer`, on a thread.

What is not the runtime's own: how ranks reach each other, and the sharding of weights over dp, of
which every emulated rank holds all. The gradient sync that would do it is watched instead.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ilm_compile.errors import ScheduleError
from ilm_compile.program.communicator import Communicator
from ilm_compile.program.layout import EXPERT_AXIS, TOKEN_AXES, Layout, Sizes
from ilm_compile.program.lowered import LoweredProgram, Stage
from ilm_compile.proof import round_trip
from ilm_compile.proof.mailroom import Mailroom, MailroomChannel
from ilm_compile.proof.threads import AxisGroups, ThreadCommunicator, ThreadGroup
from ilm_compile.runtime.batch import Batch
from ilm_compile.runtime.checkpoint.manifest import Manifest
from ilm_compile.runtime.communicator import MeasuredCommunicator
from ilm_compile.runtime.executor import Executor, StepResult
from ilm_compile.runtime.mesh import Axis, Mesh, Storage
from ilm_compile.runtime.optimizer import adamw
from ilm_compile.runtime.parallel import Parallel
from ilm_compile.runtime.step_inputs import StepInputs
from ilm_compile.runtime.trainer import Trainer
from ilm_compile.schedule import Schedule

LEARNING_RATE = 1e-2
# Of Adam: where a gradient is far below it, the rounding of its last digit is not blown up to a
# step of the next weights.
EPSILON = 1e-4
CPU = torch.device("cpu")


def optimizer_of(parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    """Return the runtime's AdamW as every step of a proof takes it."""
    return adamw(parameters, lr=LEARNING_RATE, eps=EPSILON)


class Meetings:
    """Where the ranks of a world of threads meet: `pp` meshes of these `sizes`."""

    def __init__(self, pp: int, sizes: Sizes) -> None:
        self.pp = pp
        self.turn = threading.RLock()
        self.meshes = [AxisGroups(sizes, self.turn) for _ in range(pp)]
        self.size = self.meshes[0].size
        self.everyone = ThreadGroup(pp * self.size, self.turn)
        self.mailrooms = [Mailroom(pp, self.turn) for _ in range(self.size)]
        self._pipelines: dict[tuple[tuple[int, ...], int], ThreadGroup] = {}

    def pipeline(self, pp_ranks: tuple[int, ...], rank: int) -> ThreadGroup:
        """The given pipeline ranks, each with its rank of this number."""
        new = ThreadGroup(len(pp_ranks), self.turn)
        return self._pipelines.setdefault((pp_ranks, rank), new)

    def close(self) -> None:
        """Release everyone who waits for another, with an error."""
        for mailroom in self.mailrooms:
            mailroom.close()
        for mesh in self.meshes:
            mesh.close()
        for group in (self.everyone, *self._pipelines.values()):
            group.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadMesh(Mesh):
    """A `Mesh` whose ranks are threads. It has one dp rank, which takes every replica's part.

    number: of the rank among those of its pipeline rank.
    """

    meetings: Meetings
    number: int

    @property
    def everyone(self) -> Communicator:
        number = self.pp.rank * self.meetings.size + self.number
        return ThreadCommunicator(self.meetings.everyone, number)

    def graph_communicators(self) -> dict[str, MeasuredCommunicator]:
        return {**self.meetings.meshes[self.pp.rank].communicators(self.number)}

    def data_parallel(self, layout: Layout) -> Communicator:
        axes = [a for a in TOKEN_AXES if not layout.on(a).is_shard]
        return self.meetings.meshes[self.pp.rank].communicator(self.number, axes)

    def pipeline(self, pp_ranks: tuple[int, ...]) -> Communicator | None:
        if self.pp.rank not in pp_ranks:
            return None
        group = self.meetings.pipeline(pp_ranks, self.number)
        return ThreadCommunicator(group, pp_ranks.index(self.pp.rank))


class WatchedSync:
    """Stands for the reduction of a stage's gradients over dp, and watches when it would happen."""

    def __init__(self, stage: Stage) -> None:
        self._index = stage.index
        self._is_deferred = False
        self._times = 0  # that the reduction was asked for
        self._backwards: Counter[str] = Counter()
        self._reduced: Counter[str] = Counter()
        for name, parameter in stage.module.named_parameters():
            if parameter.requires_grad:
                count = partial(self._count, name)
                parameter.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]

    def defer(self) -> None:
        self._is_deferred, self._times = True, 0
        self._backwards.clear()
        self._reduced.clear()

    def resume(self) -> None:
        self._is_deferred = False
        self._times += 1

    def reduce(self) -> None:
        self.resume()
        self._reduced.update(self._backwards.keys())

    def release(self) -> None:
        """Nothing is sharded."""

    def check(self) -> None:
        """Raise `ScheduleError` unless gradients were reduced once, in the last backward."""
        wrong = [n for n, count in self._backwards.items() if self._reduced[n] != 1]
        if self._times != 1 or self._is_deferred or wrong:
            name = wrong[0] if wrong else "its gradients"
            raise ScheduleError(
                f"emulation: the gradient sync of stage {self._index} was resumed {self._times} "
                f"times in the step, and {name} reduced in {self._reduced[name]} of "
                f"{self._backwards[name]} backwards; expected once, in the last"
            )

    def _count(self, name: str, _: Tensor) -> None:
        """A backward has added to the gradient of a parameter."""
        self._backwards[name] += 1
        if not self._is_deferred:
            self._reduced[name] += 1


class EmulatedRank:
    """Trains one rank's part. `model` as in `emulate`."""

    def __init__(
        self,
        lowered: LoweredProgram,
        schedule: Schedule,
        model: nn.Module | Mapping[str, Tensor],
        meetings: Meetings,
        place: tuple[int, int],
        *,
        dp: int,
        max_norm: float | None,
    ) -> None:
        pp_rank, number = place
        own_place = meetings.meshes[pp_rank].place(number)
        axes: dict[str, Any] = {
            axis: Axis(own_place.ranks[axis], size) for axis, size in own_place.sizes.items()
        }
        mesh = ThreadMesh(
            pp=Axis(pp_rank, meetings.pp),
            dp=Axis(),
            **axes,
            dense=Storage(_together(axes[axis] for axis in TOKEN_AXES)),
            experts=Storage(_together(axes[a] for a in TOKEN_AXES if a != EXPERT_AXIS)),
            device=CPU,
            meetings=meetings,
            number=number,
        )
        stages = tuple(
            copy.deepcopy(stage) if schedule.stage_to_rank[stage.index] == pp_rank else stage
            for stage in lowered.stages
        )
        own = replace(lowered, stages=stages)
        self.parallel = Parallel(own, schedule, mesh, model)
        self._syncs = {stage.index: WatchedSync(stage) for stage in self.parallel.stages}
        channel = MailroomChannel(meetings.mailrooms[number], pp_rank)
        self.parallel.executor = Executor(stages, schedule, mesh, self._syncs, channel)
        self._replicas = [
            StepInputs.of(
                own,
                self.parallel.stages,
                num_microbatches=schedule.num_microbatches,
                dp=Axis(replica, dp),
                device=CPU,
            )
            for replica in range(dp)
        ]
        trained = any(v.requires_grad for v in self.parallel.saved_variables().values())
        self.trainer = (
            Trainer(
                self.parallel,
                optimizer=optimizer_of(self.parallel.named_parameters()),
                max_grad_norm=max_norm,
            )
            if trained
            else None
        )

    def forward_backward(
        self, batch: Batch, number: int, *, keep_outputs: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The global loss, and where this rank has them the outputs on the rows of all replicas.

        `number` counts the steps. Gradients of all replicas are added up.
        """
        self.parallel.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        pieces: dict[str, list[Tensor]] = {}
        for replica, inputs in enumerate(self._replicas, 1):
            self.parallel.step_inputs, self.parallel.num_steps = inputs, number
            result = self.parallel.run(
                inputs.of_step(batch, number),
                keep_outputs=keep_outputs,
                is_last=replica == len(self._replicas),
            )
            for sync in self._syncs.values():
                sync.check()
            loss += self.parallel.global_loss(result)
            for name, piece in self._outputs(result).items():
                pieces.setdefault(name, []).append(piece)
        return loss, {name: torch.cat(found) for name, found in pieces.items()}

    def update(self) -> float | None:
        """Clip, and take an optimizer step; the gradient norm, None where nothing is trained."""
        return None if self.trainer is None else self.trainer.step()

    def save(self) -> tuple[round_trip.Part, Manifest]:
        """What this rank writes into a checkpoint."""
        assert self.trainer is not None
        return round_trip.take(self.trainer)

    def load(self, reader: round_trip.PieceReader) -> None:
        """Forget what was saved, and take it from the checkpoint."""
        assert self.trainer is not None
        round_trip.damage(self.trainer)
        round_trip.put_back(self.trainer, reader)

    def _outputs(self, result: StepResult) -> dict[str, Tensor]:
        if not result.outputs:
            return {}
        return {name: self.parallel.output(result, name) for name in self.parallel.output_names}


def _together(axes: Iterable[Axis]) -> Axis:
    """The ranks of several axes as those of one, the last the fastest."""
    found = Axis()
    for axis in axes:
        found = Axis(found.rank * axis.size + axis.rank, found.size * axis.size)
    return found
