"""The small model on which a plan is proven: compiled, stepped, and searched for what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ilm_compile.cost import HARDWARE
from ilm_compile.errors import IlmCompileError
from ilm_compile.passes import Pass, lower, order_passes, run_passes, standard_passes
from ilm_compile.passes.cut_points import cut_points
from ilm_compile.passes.fuse_residual import separated
from ilm_compile.passes.node_cost import step_seconds
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.program.placement import I
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import LossFn, trace
from ilm_compile.schedule import build
from ilm_compile.verify.bisect import Difference, first_difference
from ilm_compile.verify.compare import Comparison, compare
from ilm_compile.verify.emulate import Step, emulate
from ilm_compile.verify.exact import exact
from ilm_compile.verify.narrow import narrow
from ilm_compile.verify.promote import promoted_float32
from ilm_compile.verify.reference import (
    complete_inputs,
    random_batch,
    single_device_step,
    small_inputs,
)
from ilm_compile.verify.shrink import shrink


class Subject:
    """A small float64 model of the structure of `program`'s, under the same plan.

    Nothing that the search decided for the big model is left to it again: the parameters of the
    small one are placed like those of the big one. `dp`: data-parallel ranks. is_random: dropout
    stays on, and the step is compared with the same program on one rank, which draws the same
    numbers; else it is off, and the step is compared with the plain model's. Raises `PlanError` if
    the model cannot be shrunk.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        *,
        loss_fn: LossFn | None,
        passes: Sequence[Pass],
        dp: int,
        is_random: bool = False,
    ) -> None:
        plan = program.plan
        with promoted_float32():
            self.model = shrink(
                model,
                tp=plan.tp,
                num_stages=plan.num_stages,
                cuts_per_block=_cuts_per_block(program),
                num_tokens=max(n for i in program.inputs.values() for n in (*i.shape[1:], 1)),
                keep_dropout=is_random,
            )
        self.traced = self.model if plan.dtype is None else copy.deepcopy(self.model).float()
        self.inputs = small_inputs(program.inputs, plan.tp)
        self.plan = plan.replace(constraints=(*plan.constraints, *_placements(program, self.model)))
        self.loss_fn, self.passes, self.dp, self.is_random = loss_fn, tuple(passes), dp, is_random
        self.batch = random_batch(self.inputs, plan.num_microbatches * dp, _vocabulary(self.model))

    def compile(self, plan: Plan) -> Program:
        """Return the small model partitioned under `plan`."""
        program = self._trace(plan)
        run_passes(program, [*standard_passes(plan), *self.passes])
        return program

    def step(self, program: Program, batch: Mapping[str, Tensor]) -> tuple[Step, LoweredProgram]:
        """Return one step of a compiled `program`, all ranks emulated, in float64."""
        plan = program.plan
        schedule = build(
            plan.schedule,
            pp=plan.pp,
            num_microbatches=plan.num_microbatches,
            num_chunks=plan.num_chunks,
        )
        lowered = lower(self._exact(program))
        return emulate(lowered, schedule, self.model, [batch], dp=self.dp)[0], lowered

    def expected(self, batch: Mapping[str, Tensor]) -> Step:
        """Return the same step of the plain model, or of the program on one rank."""
        if self.is_random:
            plan = Plan(num_microbatches=self.plan.num_microbatches, seed=self.plan.seed)
            return self.step(self.compile(plan.replace(dtype=self.plan.dtype)), batch)[0]
        with promoted_float32():
            return single_device_step(self.model, batch, self.loss_fn)

    def bisect(self, tolerance: float) -> tuple[str, Difference] | None:
        """Return the first pass after which a node differs on one micro-batch, and that node."""
        traced, program = self._exact(self._trace(self.plan)), self._trace(self.plan)
        values = {name: self.batch[name][: i.shape[0]] for name, i in self.inputs.items()}
        values = complete_inputs(traced, values)
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for step in order_passes([*standard_passes(self.plan), *self.passes], program.facts):
            run_passes(program, [step])
            found = first_difference(
                traced, self._exact(program), tensors, values, tolerance=tolerance
            )
            if found is not None:
                return step.name, found
        return None

    def narrow(self, tolerance: float) -> str:
        """Return which simpler plan or batch makes the step right."""

        def is_right(plan: Plan, batch: Mapping[str, Tensor]) -> bool:
            rows = plan.num_microbatches * self.dp
            part = {n: value[: self.inputs[n].shape[0] * rows] for n, value in batch.items()}
            try:
                return self._compare(plan, part).is_equal(tolerance)
            except IlmCompileError:  # the simpler plan is none, or fails in another way
                return False

        return narrow(self.plan, self.batch, is_right)

    def _compare(self, plan: Plan, batch: Mapping[str, Tensor]) -> Comparison:
        step, _ = self.step(self.compile(plan), batch)
        return compare(step, self.expected(batch))

    def _trace(self, plan: Plan) -> Program:
        example = {name: (i.shape, i.dtype) for name, i in self.inputs.items()}
        with promoted_float32():
            return trace(self.traced, example_inputs=example, loss_fn=self.loss_fn, plan=plan)

    def _exact(self, program: Program) -> Program:
        return program if self.plan.dtype is None else exact(program)


def _cuts_per_block(program: Program) -> int:
    """Return at how many places each block could be cut; one where the residual is parallel."""
    program = separated(program)  # as it was when it was cut
    calls = [node for node in program.calls() if not node.meta.get("clone")]
    seconds = step_seconds(program, HARDWARE["h100"])
    cuts = cut_points(program, calls, [seconds[node] for node in calls])
    return max(1, len(cuts) // max(1, sum(region.is_block for region in program.regions)))


def _placements(program: Program, small: nn.Module) -> list[tuple[str, str]]:
    """Return the placements of `program`'s parameters as constraints on those of `small`.

    A dimension alone stands for any segments, whose sizes differ.
    """
    names = {name for name, _ in small.named_parameters()}
    names |= {name for each in program.parameter_maps for name in each.targets}
    return [
        (name, f"S({variable.placement.dim})" if variable.placement.is_shard else str(I))
        for name, variable in program.parameters().items()
        if name in names
    ]


def _vocabulary(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", 2))
