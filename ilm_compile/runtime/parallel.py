"""`Parallel`: this rank's part of a compiled model, ready to train.

What `ilm_compile.parallelize` returns. It knows a lowered program, a schedule and a mesh, and
nothing of how they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ilm_compile.program.bound import bind
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
from ilm_compile.runtime.agree import check_same_model
from ilm_compile.runtime.batch import Batch, BatchLayout, says_local
from ilm_compile.runtime.compiled import Compilation, compiler_for
from ilm_compile.runtime.executor import StepResult
from ilm_compile.runtime.forms import Compiled, Form, Shape, make_form, stages_of
from ilm_compile.runtime.guard.activity import ACTIVITY
from ilm_compile.runtime.initial_values import InitialValues
from ilm_compile.runtime.intake import Intake
from ilm_compile.runtime.materialize import Binding
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.runtime.mode import set_outputs, set_training
from ilm_compile.runtime.parameters import Parameters
from ilm_compile.runtime.shard import Shard, gather
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

    shapes: further shapes of a micro-batch that it can be given, compiled when they first are.
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
        shapes: Sequence[Shape] = (),
    ) -> None:
        values = InitialValues(
            model, seed=lowered.plan.seed, initializer=initializer, maps=lowered.parameter_maps
        )
        check_same_model(values, mesh)
        self.mesh = mesh
        self.num_steps = 0  # training steps executed; dropout masks depend on it
        self.schedule = schedule
        self.plan = lowered.plan
        self.check_ids_on_device = False
        self.inputs = lowered.inputs  # of one micro-batch, by name
        self.communicators = mesh.graph_communicators()  # by axis
        self._binding = Binding(
            mesh.device, bind(self.communicators), compiler_for(lowered.plan.compile, mesh)
        )
        self._variables = lowered.variables
        self._maps = lowered.parameter_maps
        self._parameters = Parameters(lowered, schedule, mesh, values, self._binding)
        self._is_complete = True  # the batch of the last run
        self._losses: list[Tensor] = []  # of this rank, that the gradients come from
        self._has_outputs = schedule.stage_to_rank[lowered.stages[-1].index] == mesh.pp.rank
        self.stages = stages_of(lowered, schedule, mesh)
        self._shapes = dict(enumerate(shapes, start=1))
        inputs = [lowered.inputs, *(shape.inputs for shape in shapes)]
        self._layouts = {
            number: BatchLayout(each, schedule.num_microbatches, mesh.dp)
            for number, each in enumerate(inputs)
        }
        self._is_training = True
        self._gives_outputs: dict[Form, bool] = {}  # True at first
        first = self._form(Compiled(lowered, model_flops, hardware_flops), 0)
        self._forms = {0: first}
        self.form = first  # that of the last batch
        self._use(first)
        self._intake = Intake(first.step_inputs.nothing(), mesh)

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
        is_local = batch_is_local or says_local(batch)
        taken = self._intake.take(
            batch,
            lambda: self.prepare(batch, is_local=is_local),
            is_local=is_local,
            on_device=self.check_ids_on_device,
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
        names = self.form.output_names
        name = LOGITS if LOGITS in names else names[0] if names else None
        return None if name is None else self.output(result, name), taken.rows.get(LABELS), loss

    def prepare(self, batch: Batch, *, is_local: bool = False) -> Form:
        """Be ready for batches of this one's shape, compiling its program if it is the first.

        is_local: it has this data-parallel rank's rows alone, as a `LocalBatch` does. Raises
        `BatchError` for a shape that none of the programs is for, and as `parallelize` does.
        """
        if not self._shapes:
            self.step_inputs.layout.check(batch, is_local=is_local)
            return self.form
        layouts = self._layouts.items()
        number = next((n for n, each in layouts if each.fits(batch, is_local=is_local)), None)
        if number is None:
            self._layouts[0].check(batch, is_local=is_local)
        assert number is not None
        if number not in self._forms:
            self._forms[number] = self._form(self._shapes[number].compile(), number)
        if self._forms[number] is not self.form:
            self._use(self._forms[number])
        return self.form

    def run(
        self,
        inputs: Mapping[str, Sequence[Tensor]],
        *,
        forward_only: bool = False,
        keep_outputs: bool = False,
        loss_scale: float = 1.0,
        is_last: bool = True,
    ) -> StepResult:
        """`execute_schedule` of what `StepInputs` gives; returns what this rank alone has.

        is_last: False if another run takes further rows of the same batch; gradients are complete,
        and seen by hooks, after the last.
        """
        self._parameters.follow()
        if self._gives_outputs.get(self.form, True) != keep_outputs:
            self._gives_outputs[self.form] = keep_outputs
            for stage in self.form.graphs:
                set_outputs(stage.module, keep_outputs)
        if len(self._forms) > 1:
            self.form.wear()
        result = self.executor.run(
            inputs,
            loss_gradient=self.step_inputs.loss_gradient(loss_scale),
            forward_only=forward_only,
            keep_outputs=keep_outputs,
        )
        if not forward_only:
            self.num_steps += 1
            self._note_losses(result)
            self._is_complete = is_last
            ACTIVITY.do("gradients")
            if is_last:
                self._parameters.collect_gradients(scale=loss_scale)
        return result

    def global_loss(self, result: StepResult) -> Tensor:
        """The mean loss of all micro-batches, in float64 for a float64 model, else in float32."""
        loss = self.step_inputs.share_of_loss(result.losses if self.mesh.speaks else [])
        if (ranks := self.mesh.everyone).size > 1:
            loss = ranks.all_reduce(loss)
        return loss.to(self.step_inputs.dtype)

    def output(self, result: StepResult, name: str) -> Tensor:
        """An output of the last stage, whole, of all micro-batches; stacked where it has no rows.

        Collective over the ranks that hold it.
        """
        form = self.form
        index = form.output_names.index(name)
        join = torch.cat if result.outputs[0][index].ndim else torch.stack
        layout, locals_ = form.output_layouts[index], [each[index] for each in result.outputs]
        if any(place.dim == 0 for _, place in layout.placed):  # rows: of each micro-batch apart
            whole = join([gather(local, layout, self.communicators) for local in locals_])
        else:
            whole = gather(join(locals_), layout, self.communicators)
        return whole[..., : form.output_widths.get(name)] if whole.ndim else whole

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
        self._is_training = mode
        for form in self._forms.values():
            for stage in form.graphs:
                set_training(stage.module, mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation: dropout off."""
        return self.train(False)

    def traffic(self) -> dict[str, Traffic]:
        """What this rank has sent so far: the graph's collectives by kind, and "p2p" messages.

        Of "p2p" the calls are not counted. What a step adds is `predicted_traffic` of the program.
        """
        sent: dict[str, Traffic] = {}
        for axis in self.communicators.values():
            for kind, traffic in axis.stats.items():
                sent.setdefault(kind, Traffic()).add(traffic.num_bytes, traffic.calls)
        return {**sent, "p2p": Traffic(num_bytes=self.executor.channel.bytes_sent)}

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """What torch.compile has made of this rank's regions; none without ``compile=True``."""
        compiler = self._binding.compiler
        return () if compiler is None else compiler.compilations

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs of the last stage, without the loss."""
        return self.form.output_names

    def _form(self, compiled: Compiled, number: int) -> Form:
        return make_form(
            compiled,
            number,
            self.stages,
            self.schedule,
            self.mesh,
            self._parameters.syncs,
            channel=self.form.executor.channel if number else None,
            binding=self._binding,
            training=self._is_training,
        )

    def _use(self, form: Form) -> None:
        """Make `form` the one whose batches come, and whose steps are watched like the last's."""
        watched = self.form.executor
        form.executor.record_timeline = watched.record_timeline
        form.executor.annotate = watched.annotate
        self.form = form
        self.step_inputs, self.executor = form.step_inputs, form.executor
        self.model_flops, self.hardware_flops = form.model_flops, form.hardware_flops

    def _saved(self) -> list[Variable]:
        return [v for v in self._variables.values() if _is_saved(v)]

    def _gather(self, variables: list[Variable], *, gradients: bool) -> dict[str, Tensor]:
        def pick(shard: Shard) -> Tensor:
            grad = shard.gradient() if gradients else shard.local
            return torch.zeros_like(shard.local) if grad is None else grad

        return state.gather_full(variables, self._parameters, self.mesh, self.communicators, pick)

    def _note_losses(self, result: StepResult) -> None:
        """Keep the local losses for the check in `grad_norm`, with those that added up before."""
        is_first = all(shard.public.grad is None for shard in self._parameters.parameters())
        if is_first and self._is_complete:
            self._losses = []
        self._losses += result.losses


def _is_saved(variable: Variable) -> bool:
    return variable.is_parameter or variable.persistent
