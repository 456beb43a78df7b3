"""All ranks of a compiled program in one process: one training step, schedule and all.

Every rank is a thread that runs what it would run in training: its own copy of its stages, filled
with its shards, driven by the runtime's executor through the very schedule that would be launched.
Only what carries the messages is another: threads meet instead of processes. Data-parallel replicas
run one after the other and add up their gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ilm_compile.errors import PlacementError, ProgramError
from ilm_compile.program.dropout import SEED
from ilm_compile.program.lowered import LoweredProgram, Stage
from ilm_compile.program.parameter_map import check_round_trip, gradients_to_model, to_model
from ilm_compile.program.placement import join_shards, split_shards
from ilm_compile.program.program import Variable
from ilm_compile.runtime.batch import BatchLayout
from ilm_compile.runtime.executor import Executor
from ilm_compile.runtime.initial_values import InitialValues
from ilm_compile.runtime.materialize import fill, finish, resolve
from ilm_compile.runtime.mesh import Axis, Mesh
from ilm_compile.runtime.optimizer import adamw
from ilm_compile.runtime.p2p import Channel
from ilm_compile.schedule import Schedule
from ilm_compile.verify.mailroom import Mailroom, MailroomChannel
from ilm_compile.verify.threads import run_groups

LEARNING_RATE = 1e-2
CPU = torch.device("cpu")
Copies = list[Tensor]  # what the tp ranks of one stage hold of one variable, by rank


@dataclass(frozen=True, slots=True)
class Step:
    """One training step: the loss, and by name the gradients and the weights after AdamW."""

    loss: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def emulate(
    lowered: LoweredProgram,
    schedule: Schedule,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    dp: int = 1,
) -> Step:
    """Return one step of `lowered` on the global `batch`, from the weights of `model`.

    Raises `ScheduleError` if a rank waits for a message that is never sent.
    """
    tp, pp = lowered.plan.tp, schedule.num_ranks
    mailrooms = [Mailroom(pp) for _ in range(tp)]
    maps = lowered.parameter_maps
    check_round_trip(maps, dict(model.named_parameters()))
    values = InitialValues(model, seed=lowered.plan.seed, maps=maps)

    def rank(pp_rank: int, tp_rank: int) -> tuple[list[Tensor], list[Stage]]:
        mesh = Mesh(pp=Axis(pp_rank, pp), dp=Axis(), tp=Axis(tp_rank, tp), device=CPU)
        stages = [
            _fill(stage, lowered, values, mesh)
            for stage in lowered.stages
            if schedule.stage_to_rank[stage.index] == pp_rank
        ]
        channel = MailroomChannel(mailrooms[tp_rank], pp_rank)
        executor = Executor(stages, schedule, mesh, channel=cast(Channel, channel))
        losses = []
        for replica in range(dp):
            layout = BatchLayout(lowered.inputs, schedule.num_microbatches, Axis(replica, dp))
            inputs = _inputs(lowered, layout, stages, batch)
            losses += executor.run(inputs, loss_gradient=1 / layout.num_slices).losses
        mailrooms[tp_rank].finish(pp_rank)
        return losses, stages

    def close() -> None:
        for mailroom in mailrooms:
            mailroom.close()

    ranks = run_groups(pp, tp, rank, on_failure=close)
    for mailroom in mailrooms:
        mailroom.check_empty()
    losses = [loss for group in ranks for loss in group[0][0]]
    held: dict[str, list[Copies]] = {}
    for group in ranks:
        for stages in zip(*(stages for _, stages in group), strict=True):
            for name in stages[0].variables:
                held.setdefault(name, []).append([resolve(stage, name) for stage in stages])
    parameters = {n: c for n, c in held.items() if lowered.variables[n].is_parameter}
    gradients = {n: _gradient(lowered.variables[n], c) for n, c in parameters.items()}
    weights = _update(lowered, parameters, gradients)
    variables = lowered.variables
    return Step(
        torch.stack(losses).mean(),
        gradients_to_model(maps, {n: variables[n].unpad(g) for n, g in gradients.items()}),
        to_model(maps, {n: variables[n].unpad(w) for n, w in weights.items()}),
    )


def _fill(stage: Stage, lowered: LoweredProgram, values: InitialValues, mesh: Mesh) -> Stage:
    own = copy.deepcopy(stage)
    fill(own, own.variables, lowered.variables, values, mesh)
    finish(own, mesh.device)
    return own


def _inputs(
    lowered: LoweredProgram, layout: BatchLayout, stages: list[Stage], batch: Mapping[str, Tensor]
) -> dict[str, list[Tensor]]:
    """Return the inputs of one replica's micro-batches, the number of targets among them."""
    names = {name for stage in stages for name in stage.batch_inputs}
    inputs = layout.split(batch, names & set(layout.inputs), CPU)
    for name, graph in lowered.target_counts.items():
        count = layout.count_targets(batch, graph) / layout.num_slices
        inputs[name] = [torch.tensor(count, dtype=torch.float64)] * layout.num_microbatches
    inputs[SEED] = layout.dropout_seeds(lowered.plan.seed, 0)
    return inputs


def _gradient(variable: Variable, stages: list[Copies]) -> Tensor:
    """Return the full gradient of a parameter, summed over the stages that hold it."""
    frozen = [number for number, copies in enumerate(stages, 1) if not copies[0].requires_grad]
    if 0 < len(frozen) < len(stages):
        raise ProgramError(
            f"emulation: {variable.name} is held by {len(stages)} stages, and copy {frozen[0]} "
            "gets no gradient; each copy of a tied parameter must get the sum of all gradients"
        )
    parts = [_whole(variable, [_grad(tensor) for tensor in copies]) for copies in stages]
    return torch.stack(parts).sum(0)


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _whole(variable: Variable, copies: Copies) -> Tensor:
    """Return the full tensor of which the tp ranks hold `copies`."""
    if variable.placement.is_shard:
        return join_shards(copies, variable.placement)
    for rank, other in enumerate(copies):
        if not torch.allclose(other, copies[0], rtol=1e-9, atol=1e-12):
            raise PlacementError(
                f"emulation: {variable.name} is invariant, but its gradient or its updated value "
                f"differs between tp ranks 0 and {rank}: it is not fully reduced"
            )
    return copies[0]


def _update(
    lowered: LoweredProgram, parameters: dict[str, list[Copies]], gradients: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Take one clipped AdamW step on every rank's shards and return the full weights."""
    size = lowered.plan.tp
    scale = clip_coefficient(gradients)
    for name, stages in parameters.items():
        placement = lowered.variables[name].placement
        full = gradients[name] * scale
        shards = split_shards(full, placement, size) if placement.is_shard else [full] * size
        for copies in stages:
            for parameter, shard in zip(copies, shards, strict=True):
                parameter.grad = shard.clone()
    named = [(n, tensor) for n, stages in parameters.items() for c in stages for tensor in c]
    adamw(((n, cast(Parameter, p)) for n, p in named if p.requires_grad), lr=LEARNING_RATE).step()
    weights = {n: [_whole(lowered.variables[n], c) for c in s] for n, s in parameters.items()}
    for name, copies in weights.items():
        if any(not torch.equal(copies[0], other) for other in copies[1:]):
            raise PlacementError(f"emulation: the copies of the tied {name} differ after one step")
    return {name: copies[0].detach() for name, copies in weights.items()}


def clip_coefficient(gradients: Mapping[str, Tensor], max_norm: float = 1.0) -> float:
    """Return the factor that scales `gradients` to a global norm of at most `max_norm`."""
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return min(1.0, max_norm / (float(norm) + 1e-6))
