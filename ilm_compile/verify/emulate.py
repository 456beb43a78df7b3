"""All ranks of a compiled program in one process: training steps, schedule and all.

Every rank is a thread that runs what it would run in training: its own copy of its stages, filled
with its shards, driven by the runtime's executor through the very schedule that would be launched.
Only what carries the messages is another: threads meet instead of processes. Data-parallel replicas
run one after the other and add up their gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ilm_compile.errors import PlacementError, ProgramError
from ilm_compile.program.lowered import LoweredProgram, Stage
from ilm_compile.program.parameter_map import check_round_trip, gradients_to_model, to_model
from ilm_compile.program.placement import Placement, join_shards, split_shards
from ilm_compile.program.program import Variable
from ilm_compile.runtime.batch import Batch
from ilm_compile.runtime.executor import Executor
from ilm_compile.runtime.initial_values import InitialValues, tensors_of
from ilm_compile.runtime.materialize import fill, finish, resolve
from ilm_compile.runtime.mesh import Axis, Mesh
from ilm_compile.runtime.optimizer import adamw
from ilm_compile.runtime.step_inputs import StepInputs
from ilm_compile.schedule import Schedule
from ilm_compile.verify.mailroom import Mailroom, MailroomChannel
from ilm_compile.verify.threads import run_groups

LEARNING_RATE = 1e-2
CPU = torch.device("cpu")
Copies = list[Tensor]  # what the tp ranks of one stage hold of one variable, by rank


@dataclass(frozen=True, slots=True)
class Step:
    """One training step, everything whole and by the user's names.

    gradients: as they were added up, before clipping, of the parameters that got one. weights: of
    all parameters after AdamW. outputs: of the last stage but the loss, on the rows of the global
    batch, if they were asked for.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Rank:
    stages: list[Stage]
    executor: Executor
    replicas: list[StepInputs]


@dataclass(frozen=True, slots=True)
class _Result:
    """loss: this rank's share. outputs: of each micro-batch of all replicas."""

    loss: Tensor
    outputs: list[tuple[Tensor, ...]]


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
    clipped to, None for no clipping. Raises `ScheduleError` if a rank waits for a message that is
    never sent, `PlacementError` and `ProgramError` where ranks that must agree do not.
    """
    world = _World(lowered, schedule, model, dp)
    return [
        world.step(batch, number, max_norm=max_norm, keep_outputs=keep_outputs)
        for number, batch in enumerate(batches)
    ]


class _World:
    """All ranks, with weights and optimizer state."""

    def __init__(
        self,
        lowered: LoweredProgram,
        schedule: Schedule,
        model: nn.Module | Mapping[str, Tensor],
        dp: int,
    ) -> None:
        self.lowered, self.schedule = lowered, schedule
        tp, pp = lowered.plan.tp, schedule.num_ranks
        full = tensors_of(model) if isinstance(model, nn.Module) else dict(model)
        check_round_trip(lowered.parameter_maps, full)
        values = InitialValues(model, seed=lowered.plan.seed, maps=lowered.parameter_maps)
        self.mailrooms = [Mailroom(pp) for _ in range(tp)]

        def make(pp_rank: int, tp_rank: int) -> _Rank:
            mesh = Mesh(pp=Axis(pp_rank, pp), dp=Axis(), tp=Axis(tp_rank, tp), device=CPU)
            stages = [
                _fill(stage, lowered, values, mesh)
                for stage in lowered.stages
                if schedule.stage_to_rank[stage.index] == pp_rank
            ]
            channel = MailroomChannel(self.mailrooms[tp_rank], pp_rank)
            replicas = [
                StepInputs.of(
                    lowered,
                    stages,
                    num_microbatches=schedule.num_microbatches,
                    dp=Axis(replica, dp),
                    device=CPU,
                )
                for replica in range(dp)
            ]
            return _Rank(stages, Executor(stages, schedule, mesh, channel=channel), replicas)

        self.ranks = [[make(p, t) for t in range(tp)] for p in range(pp)]
        variables = lowered.variables
        held: dict[str, list[Copies]] = {}
        for group in self.ranks:
            for stages in zip(*(rank.stages for rank in group), strict=True):
                for name in stages[0].variables:
                    held.setdefault(name, []).append([resolve(stage, name) for stage in stages])
        self.parameters = {n: held[n] for n in variables if n in held and variables[n].is_parameter}
        self.unused = {
            name: values.shard(variable, rank=0, size=1)
            for name, variable in variables.items()
            if variable.is_parameter and name not in held
        }
        self.optimizer: Optimizer | None = None

    def step(
        self, batch: Batch, number: int, *, max_norm: float | None, keep_outputs: bool
    ) -> Step:
        results = self._run(batch, number, keep_outputs=keep_outputs)
        variables, maps = self.lowered.variables, self.lowered.parameter_maps
        gradients = {
            name: gradient
            for name, stages in self.parameters.items()
            if (gradient := _gradient(variables[name], stages)) is not None
        }
        self._update(gradients, max_norm)
        weights = {**self._weights(), **self.unused}
        return Step(
            torch.stack([group[0].loss for group in results]).sum(),
            gradients_to_model(maps, {n: variables[n].unpad(g) for n, g in gradients.items()}),
            to_model(maps, {n: variables[n].unpad(w).clone() for n, w in weights.items()}),
            self._outputs(results) if keep_outputs else {},
        )

    def _run(self, batch: Batch, number: int, *, keep_outputs: bool) -> list[list[_Result]]:
        """Forward and backward of all ranks, each on its thread."""
        for mailroom in self.mailrooms:
            mailroom.start()

        def run(pp_rank: int, tp_rank: int) -> _Result:
            rank = self.ranks[pp_rank][tp_rank]
            loss = torch.zeros((), dtype=torch.float64)
            outputs: list[tuple[Tensor, ...]] = []
            for inputs in rank.replicas:
                result = rank.executor.run(
                    inputs.of_step(batch, number),
                    loss_gradient=inputs.loss_gradient(),
                    keep_outputs=keep_outputs,
                )
                loss += inputs.share_of_loss(result.losses)
                outputs += result.outputs
            self.mailrooms[tp_rank].finish(pp_rank)
            return _Result(loss, outputs)

        def close() -> None:
            for mailroom in self.mailrooms:
                mailroom.close()

        results = run_groups(len(self.ranks), len(self.mailrooms), run, on_failure=close)
        for mailroom in self.mailrooms:
            mailroom.check_empty()
        return results

    def _outputs(self, results: list[list[_Result]]) -> dict[str, Tensor]:
        """The outputs of the last stage but the loss, whole, on all rows."""
        last = self.lowered.stages[-1]
        group = results[self.schedule.stage_to_rank[last.index]]
        outputs = {}
        for index, name in enumerate(last.outputs[1:]):
            placement = self.lowered.output_placements[index + 1]
            width = self.lowered.output_widths.get(name)
            copies = zip(*([each[index] for each in r.outputs] for r in group), strict=True)
            pieces = [_joined(list(each), placement, f"output {name}") for each in copies]
            whole = torch.stack(pieces) if pieces[0].ndim == 0 else torch.cat(pieces)
            outputs[name] = whole if width is None else whole[..., :width]
        return outputs

    def _update(self, gradients: Mapping[str, Tensor], max_norm: float | None) -> None:
        """Take one clipped AdamW step on every rank's shards."""
        size = self.lowered.plan.tp
        scale = clip_coefficient(gradients, max_norm)
        for name, stages in self.parameters.items():
            placement = self.lowered.variables[name].placement
            full = gradients[name] * scale if name in gradients else None
            for copies in stages:
                for parameter, shard in zip(copies, _cut(full, placement, size), strict=True):
                    parameter.grad = shard
        if self.optimizer is None and gradients:
            held = ((n, c) for n, stages in self.parameters.items() for s in stages for c in s)
            self.optimizer = adamw(((n, cast(Parameter, p)) for n, p in held), lr=LEARNING_RATE)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, stages in self.parameters.items():
            variable = self.lowered.variables[name]
            copies = [_joined(s, variable.placement, variable.name) for s in stages]
            if any(not torch.equal(copies[0], other) for other in copies[1:]):
                raise PlacementError(
                    f"emulation: the copies of the tied {name} differ after one step"
                )
            weights[name] = copies[0].detach()
        return weights


def _fill(stage: Stage, lowered: LoweredProgram, values: InitialValues, mesh: Mesh) -> Stage:
    own = copy.deepcopy(stage)
    fill(own, own.variables, lowered.variables, values, mesh)
    finish(own, mesh.device)
    return own


def _gradient(variable: Variable, stages: list[Copies]) -> Tensor | None:
    """Return the full gradient of a parameter, summed over the stages that hold it."""
    frozen = [number for number, copies in enumerate(stages, 1) if not copies[0].requires_grad]
    if 0 < len(frozen) < len(stages):
        raise ProgramError(
            f"emulation: {variable.name} is held by {len(stages)} stages, and copy {frozen[0]} "
            "gets no gradient; each copy of a tied parameter must get the sum of all gradients"
        )
    if all(tensor.grad is None for copies in stages for tensor in copies):
        return None
    parts = [
        _joined([_grad(tensor) for tensor in copies], variable.placement, variable.name)
        for copies in stages
    ]
    return torch.stack(parts).sum(0)


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _joined(copies: Copies, placement: Placement, name: str) -> Tensor:
    """Return the full tensor of which the tp ranks hold `copies`."""
    if placement.is_shard:
        return join_shards(copies, placement)
    if placement.kind == "P":
        return torch.stack(copies).sum(0)
    for rank, other in enumerate(copies):
        if not torch.allclose(other, copies[0], rtol=1e-9, atol=1e-12, equal_nan=True):
            raise PlacementError(
                f"emulation: {name} is invariant, but its gradient or its updated value "
                f"differs between tp ranks 0 and {rank}: it is not fully reduced"
            )
    return copies[0]


def _cut(full: Tensor | None, placement: Placement, size: int) -> list[Tensor | None]:
    """Return a shard of its own memory for each tp rank."""
    if full is None:
        return [None] * size
    shards = split_shards(full, placement, size) if placement.is_shard else [full] * size
    return [shard.clone() for shard in shards]


def clip_coefficient(gradients: Mapping[str, Tensor], max_norm: float | None = 1.0) -> float:
    """Return the factor that scales `gradients` to a global norm of at most `max_norm`."""
    if max_norm is None or not gradients:
        return 1.0
    norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
    return min(1.0, max_norm / (float(norm) + 1e-6))
