"""`Parallel`: this rank's part of a compiled model, ready to train.

What `ilm_compile.parallelize` returns. It knows a lowered program, a schedule and a mesh, and
nothing of how they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.program.parameter_map import (
    ParameterMap,
    gradients_to_model,
    model_variables,
    to_model,
    to_program,
)
from ilm_compile.program.program import Variable
from ilm_compile.program.traffic import Traffic
from ilm_compile.runtime import norm, state
from ilm_compile.runtime.batch import Batch
from ilm_compile.runtime.communicator import MeasuredCommunicator
from ilm_compile.runtime.executor import Executor, StepResult
from ilm_compile.runtime.guard.activity import ACTIVITY
from ilm_compile.runtime.initial_values import InitialValues
from ilm_compile.runtime.intake import Intake
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.runtime.mode import set_training
from ilm_compile.runtime.parameters import Parameters
from ilm_compile.runtime.shard import Shard, gather
from ilm_compile.runtime.step_inputs import StepInputs
from ilm_compile.schedule import Schedule

LABELS = "labels"
LOGITS = "logits"
Result = Tensor | None | tuple[Tensor | None, Tensor | None, Tensor | None]


class Parallel:
    """One rank of a parallel run.

    model: where the initial values come from; its real tensors are copied, meta ones initialised
    from ``lowered.plan.seed``. It must be the same on every rank; or full tensors by name.
    initializer: gives the value of a
    parameter that is on meta (`InitialValues`); None for models without one. model_flops: forward
    and backward operations of one micro-batch of the whole model, if known. hardware_flops: those
    with what activation checkpointing computes twice. The attributes are of the global batch.

    check_ids_on_device: look at the ids of a batch that is on a GPU too, which waits for it; those
    on the CPU are always looked at.
    """

    def __init__(
        self,
        lowered: LoweredProgram,
        schedule: Schedule,
        mesh: Mesh,
        model: nn.Module | Mapping[str, Tensor],
        *,
        initializer: Callable[..., Tensor] | None = None,
        model_flops: float | None = None,
        hardware_flops: float | None = None,
    ) -> None:
        values = InitialValues(
            model, seed=lowered.plan.seed, initializer=initializer, maps=lowered.parameter_maps
        )
        _check_same_model(values, mesh)
        self.mesh = mesh
        self.num_steps = 0  # training steps executed; dropout masks depend on it
        self.schedule = schedule
        self.plan = lowered.plan
        self.check_ids_on_device = False
        self.inputs = lowered.inputs  # of one micro-batch, by name
        self._tp = mesh.tensor_parallel()
        mesh.bind(self._tp)
        self._variables = lowered.variables
        self._maps = lowered.parameter_maps
        self._parameters = Parameters(lowered, schedule, mesh, values)
        self._losses: list[Tensor] = []  # of this rank, that the gradients come from
        last = lowered.stages[-1]
        self.output_names = last.outputs[1:]  # without the loss
        self._output_placements = lowered.output_placements[1:]
        self._output_widths = lowered.output_widths
        self._has_outputs = schedule.stage_to_rank[last.index] == mesh.pp.rank
        self.stages = [
            stage for stage in lowered.stages if schedule.stage_to_rank[stage.index] == mesh.pp.rank
        ]
        self.step_inputs = StepInputs.of(
            lowered,
            self.stages,
            num_microbatches=schedule.num_microbatches,
            dp=mesh.dp,
            device=mesh.device,
        )
        self._intake = Intake(self.step_inputs, lowered.lookups, mesh)
        slices = self.step_inputs.layout.num_slices
        self.model_flops = None if model_flops is None else model_flops * slices
        self.hardware_flops = None if hardware_flops is None else hardware_flops * slices
        self.executor = Executor(lowered.stages, schedule, mesh, self._parameters.syncs)

    def execute_schedule(
        self,
        batch: Batch,
        *,
        forward_only: bool = False,
        return_loss: bool = True,
        return_output_label: bool = False,
        loss_scale: float = 1.0,
        batch_is_local: bool = False,
    ) -> Result:
        """Run forward and backward of the global batch, adding to the gradients.

        batch: every input of the model by name, with the rows of all micro-batches of all
        data-parallel ranks, the same on every rank; with `batch_is_local`, and for what the data
        loader gives, those of this data-parallel rank alone (`BatchLayout.own`). Returns the loss
        of the global batch, a scalar equal on every rank, or None if not `return_loss`. With
        `return_output_label` returns (outputs, labels, loss): the logits of this data-parallel
        rank's rows and their labels, both None except on the last pipeline stage. loss_scale: what
        the gradients are multiplied by, not the loss returned. Raises `BatchError` on every rank
        for another batch than the program was compiled for, for ids outside the vocabulary, and on
        the first step and every hundredth if the ranks were given different batches.
        """
        taken = self._intake.take(
            batch, is_local=batch_is_local, on_device=self.check_ids_on_device
        )
        result = self.run(
            self.step_inputs.of_rows(taken.rows, taken.counts, self.num_steps),
            forward_only=forward_only,
            keep_outputs=return_output_label,
            loss_scale=loss_scale,
        )
        ACTIVITY.do("loss")
        loss = self.global_loss(result) if return_loss else None
        if not return_output_label:
            return loss
        if not self._has_outputs:
            return None, None, loss
        names = self.output_names
        name = LOGITS if LOGITS in names else names[0] if names else None
        return None if name is None else self.output(result, name), taken.rows.get(LABELS), loss

    def run(
        self,
        inputs: Mapping[str, Sequence[Tensor]],
        *,
        forward_only: bool = False,
        keep_outputs: bool = False,
        loss_scale: float = 1.0,
    ) -> StepResult:
        """`execute_schedule` of what `StepInputs` gives; returns what this rank alone has."""
        self.mesh.bind(self._tp)
        self._parameters.follow()
        result = self.executor.run(
            inputs,
            loss_gradient=self.step_inputs.loss_gradient(loss_scale),
            forward_only=forward_only,
            keep_outputs=keep_outputs,
        )
        if not forward_only:
            self.num_steps += 1
            self._note_losses(result)
            ACTIVITY.do("gradients")
            self._parameters.collect_gradients()
        return result

    def global_loss(self, result: StepResult) -> Tensor:
        """The mean loss of all micro-batches, in float64 for a float64 model, else in float32."""
        own = self.step_inputs.share_of_loss(result.losses if self.mesh.tp.rank == 0 else [])
        return self.mesh.everyone.all_reduce(own).to(self.step_inputs.dtype)

    def output(self, result: StepResult, name: str) -> Tensor:
        """An output of the last stage, whole, of all micro-batches. Collective over its tp ranks.

        Stacked where it has no rows.
        """
        index = self.output_names.index(name)
        join = torch.cat if result.outputs[0][index].ndim else torch.stack
        local = join([outputs[index] for outputs in result.outputs])
        whole = gather(local, self._output_placements[index], self._tp)
        return whole[..., : self._output_widths.get(name)] if whole.ndim else whole

    @property
    def parameters(self) -> Parameters:
        """What this rank holds of parameters and buffers."""
        return self._parameters

    @property
    def parameter_maps(self) -> tuple[ParameterMap, ...]:
        """What passes have made of the model's parameters, in order."""
        return self._maps

    def saved_variables(self) -> dict[str, Variable]:
        """The parameters and persistent buffers of the user's model, of all ranks, by name."""
        found = model_variables(self._maps, self._variables)
        return {name: variable for name, variable in found.items() if _is_saved(variable)}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for shard in self._parameters.shards.values():
            shard.public.grad = None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters as DTensors, under the names of the model's `named_parameters`.

        What a pass has made of several parameters comes under the name that the pass gave it. They
        share memory with what the stages compute with: change them in place. A tied parameter is
        yielded by every rank that holds it. Without torch.distributed they are plain tensors.
        """
        for shard in self._parameters.parameters():
            assert isinstance(shard.public, nn.Parameter)
            yield shard.variable.name, shard.public

    def grad_norm(self) -> Tensor:
        """The 2-norm of the gradients of all parameters of all ranks: a float64 scalar.

        Not finite, on every rank, if a gradient on any rank is not, be it one of several equal
        parts, or the loss of any micro-batch that they came from.
        """
        counted: list[Tensor] = []
        others: list[Tensor] = []
        for shard in self._parameters.parameters():
            if (grad := shard.gradient()) is not None:
                (counted if self._parameters.counts(shard) else others).append(grad)
        return norm.global_norm(counted, self.mesh, checked=[*others, *self._losses])

    def clip_grad_norm_(self, max_norm: float | None, *, scale: float = 1.0) -> Tensor:
        """Scale the gradients so that their norm is at most `max_norm`; returns it as it was.

        scale: the `loss_scale` of their steps, which is divided out of gradients and norm first.
        max_norm: None for no limit.
        """
        total = self.grad_norm() / scale
        shards = self._parameters.parameters()
        gradients = [g for s in shards if (g := s.gradient()) is not None]
        norm.clip(gradients, total, max_norm, scale=scale)
        return total

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer, whole, on the CPU of rank 0; empty elsewhere.

        Collective. Names (aliases of tied tensors included) and layout are the user's. Each tensor
        has memory of its own, so that safetensors' `save_file` takes them.
        """
        full = to_model(self._maps, self._gather(self._saved(), gradients=False))
        if not full:
            return {}
        saved = self.saved_variables().values()
        named = {alias: full[v.name] for v in saved for alias in (v.name, *v.aliases)}
        return state.each_of_its_own(named)

    def full_gradients(self) -> dict[str, Tensor]:
        """Every gradient, whole, on the CPU of rank 0; empty elsewhere. Collective.

        Each has memory of its own.
        """
        trained = [v for v in self._variables.values() if v.is_parameter]
        names = state.names_with_gradient(self._parameters, trained, self.mesh)
        gradients = self._gather([v for v in trained if v.name in names], gradients=True)
        return state.each_of_its_own(gradients_to_model(self._maps, gradients))

    def load_state_dict(self, full: Mapping[str, Tensor]) -> None:
        """Load what `full_state_dict` gives. Collective; only rank 0's argument counts.

        Raises `IlmCompileError` on every rank, before anything is changed, for missing or
        unexpected names, other shapes or other dtypes.
        """
        state.check_full(full, list(self.saved_variables().values()), self.mesh)
        if self.mesh.rank == 0:
            full = to_program(self._maps, full)
        state.load_full(full, self._saved(), self._parameters, self.mesh)

    def train(self, mode: bool = True) -> Self:
        """Switch to training (dropout on), or to evaluation if not `mode`."""
        for stage in self.stages:
            set_training(stage.module, mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation: dropout off."""
        return self.train(False)

    def traffic(self) -> dict[str, Traffic]:
        """What this rank has sent so far: tp collectives by kind, and "p2p" between stages.

        Of "p2p" the calls are not counted. What a step adds is `predicted_traffic` of the program.
        """
        sent = {kind: replace(traffic) for kind, traffic in self._tp.stats.items()}
        return {**sent, "p2p": Traffic(num_bytes=self.executor.channel.bytes_sent)}

    @property
    def communicator(self) -> MeasuredCommunicator:
        """That of the tp axis."""
        return self._tp

    def _saved(self) -> list[Variable]:
        return [v for v in self._variables.values() if _is_saved(v)]

    def _gather(self, variables: list[Variable], *, gradients: bool) -> dict[str, Tensor]:
        def pick(shard: Shard) -> Tensor:
            grad = shard.gradient() if gradients else shard.local
            return torch.zeros_like(shard.local) if grad is None else grad

        return state.gather_full(variables, self._parameters, self.mesh, self._tp, pick)

    def _note_losses(self, result: StepResult) -> None:
        """Keep the local losses for the check in `grad_norm`, with those that added up before."""
        if all(shard.public.grad is None for shard in self._parameters.parameters()):
            self._losses = []
        self._losses += result.losses


def _is_saved(variable: Variable) -> bool:
    return variable.is_parameter or variable.persistent


def _check_same_model(values: InitialValues, mesh: Mesh) -> None:
    """Raise on every rank if the ranks were given models with different weights."""
    if not mesh.is_distributed or not (sums := values.checksums()):
        return
    own = torch.tensor(list(sums.values()), dtype=torch.float64, device=mesh.device)
    extremes = torch.stack([own, -own])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=mesh.group)
    # Not exactly: processors of another kind may add up in another order.
    is_same = torch.isclose(extremes[0], -extremes[1], rtol=1e-9, atol=1e-9)
    different = (~is_same).nonzero().flatten().tolist()
    if different:
        name = list(sums)[different[0]]
        raise IlmCompileError(
            f"parallelize: expected the same model on every rank, got different values of {name}; "
            "call torch.manual_seed before building the model, or build it on the meta device"
        )
