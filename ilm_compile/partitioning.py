"""The front door: `partition` a model in one process, `parallelize` it under torchrun.

`partition` is `trace` and `compile`, for those who have many plans for one model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ilm_compile.automatic import automatic_plans, first_compiled
from ilm_compile.cost import forward_flops_by_region, model_flops, region_bytes
from ilm_compile.errors import PlanError
from ilm_compile.ops.lookups import find_lookups
from ilm_compile.passes import Pass, PassReport, lower, run_passes
from ilm_compile.passes.standard import plan_passes, settle_kernels, with_passes
from ilm_compile.program.copy import copy_program
from ilm_compile.program.plan import AUTO, Plan
from ilm_compile.program.program import Input, Program
from ilm_compile.program.trace import ExampleInputs, LossFn, trace
from ilm_compile.runtime import Mesh, Parallel
from ilm_compile.runtime.forms import Compiled, Shape
from ilm_compile.runtime.mesh import choose_device, fit_world, world_size
from ilm_compile.schedule import check, schedule_of
from ilm_compile.shapes import (
    Shapes,
    check_alike,
    passes_like,
    plan_like,
    read_shapes,
)
from ilm_compile.sharding.loss_terms import check_loss

make_schedule = schedule_of
DTYPE_NAMES = {None: None, torch.bfloat16: "bfloat16", torch.float16: "float16"}
MOST_TOLD = 16  # of a program's warnings, by a launch


def make_plan(plan: Plan | str | Path | None = None, **keywords: Any) -> Plan:
    """Return the plan that the keywords of `partition` and `parallelize` describe.

    `plan` (a `Plan`, or a path to its JSON) is the start, keywords that are not None change it.
    Raises `PlanError` for a plan that can be known to be wrong without the model.
    """
    start = plan if isinstance(plan, Plan) else Plan() if plan is None else Plan.from_json(plan)
    dtype = keywords.pop("dtype", None)
    if dtype not in DTYPE_NAMES and dtype not in DTYPE_NAMES.values():
        raise PlanError(f"plan: dtype must be None, torch.bfloat16 or torch.float16, got {dtype}")
    keywords["dtype"] = DTYPE_NAMES.get(dtype, dtype)
    given = {name: value for name, value in keywords.items() if value is not None}
    changed = start.replace(**given)
    if plan is None and "num_microbatches" not in given:
        changed = changed.replace(num_microbatches=changed.pp)
    if plan is None and "schedule" not in given and changed.num_chunks > 1:
        changed = changed.replace(schedule="interleaved_1f1b")
    check(schedule_of(changed))
    return changed


def partition(
    model: nn.Module,
    *,
    example_inputs: ExampleInputs | None = None,
    loss_fn: LossFn | None = None,
    passes: Sequence[Pass | str] = (),
    disable: Collection[str] = (),
    callback: Callable[[PassReport], None] | None = None,
    validate: str | None = "types",
    plan: Plan | str | Path | None = None,
    **keywords: Any,
) -> Program:
    """Return `model` as a partitioned program; one process, no torch.distributed, meta is enough.

    Keywords are the fields of `Plan`: tp, cp, ep, pp, dp (which matters to the loss alone here, see
    `check_loss`), hardware, num_chunks, num_microbatches, schedule,
    sequence_parallel, async_tensor_parallel, cp_attention, embed_split_hidden, dispatch,
    constraints (name or glob to Shard(dim)), checkpoint, dtype (torch.bfloat16 or torch.float16),
    zero, seed, kernels ("triton": fused ops, which are partitioned anywhere and run on CUDA;
    "torch": none; "auto": those if this machine can run them), compile (torch.compile of each
    region where it runs: True, or a backend by name). `passes`, themselves or as a plan has them in
    text, are run beside the standard ones,
    in the order their requirements give, without those named in `disable`, each
    checked as `validate` says ("types", "numerics" or None: see `run_passes`); `example_inputs`
    and `loss_fn` as in `trace`. Parameters in bfloat16 or float16 are trained as float32
    (see `MasterWeights`). Raises `TraceError` if the
    model cannot be captured and `PlanError` or `ScheduleError` if the plan does not fit it.
    """
    program = trace(model, example_inputs=example_inputs, loss_fn=loss_fn)
    how = Rewriting(passes, disable, callback, validate)
    return _compile(program, make_plan(plan, **keywords), how)


def compile(
    program: Program,
    plan: Plan | str | Path | None = None,
    *,
    passes: Sequence[Pass | str] = (),
    disable: Collection[str] = (),
    callback: Callable[[PassReport], None] | None = None,
    validate: str | None = "types",
    **keywords: Any,
) -> Program:
    """Return what `trace` made, partitioned; `program` stays as it is, and serves the next plan.

    Keywords as for `partition`. The model that was traced must not have changed: where a loss does
    not tell what it averages over, it is traced again with other numbers of rows. Raises
    `PlanError` if the plan does not fit, or if `program` has been partitioned.
    """
    if done := sorted(program.facts - {"traced"}):
        raise PlanError(
            f"compile: expected a program as trace() made it, got one that is {', '.join(done)}; "
            "trace the model, and compile that for each plan"
        )
    how = Rewriting(passes, disable, callback, validate)
    return _compile(copy_program(program), make_plan(plan, **keywords), how)


def compile_like(
    first: Program, inputs: Mapping[str, Input], *, plan: Plan, how: Rewriting
) -> Program:
    """Return the program of other `inputs` that holds its parameters as `first` does.

    Traced anew, for sizes are baked into a graph. `plan` and `how` are those of `first`. Raises
    `PlanError` if the two cannot share their parameters.
    """
    assert first.retrace is not None
    program = _compile(first.retrace(inputs), plan_like(first, plan), how, like=first)
    check_alike(first, program)
    return program


@dataclass(frozen=True, slots=True)
class Rewriting:
    """The keywords of `partition` that a plan has not: see there."""

    passes: Sequence[Pass | str] = ()
    disable: Collection[str] = ()
    callback: Callable[[PassReport], None] | None = None
    validate: str | None = "types"


def _compile(program: Program, plan: Plan, how: Rewriting, like: Program | None = None) -> Program:
    program.plan = plan = with_passes(plan, how.passes, how.disable)
    program.lookups = tuple(find_lookups(program))
    check_loss(program, num_slices=plan.num_microbatches * (plan.dp or 1))
    program.flops = model_flops(program.graph)
    forward = forward_flops_by_region(program.graph)
    run_passes(
        program,
        passes_like(like, plan_passes(program, how.passes)),
        disable=plan.disable,
        callback=how.callback,
        validate=how.validate,
    )
    marked = [index for index, region in enumerate(program.regions) if region.recompute]
    program.recomputed_flops = sum(forward[index] for index in marked)
    program.region_bytes = region_bytes
    return program


def parallelize(
    model: nn.Module,
    *,
    timeout: timedelta = timedelta(minutes=5),
    shapes: Shapes = (),
    tokens_per_batch: int | None = None,
    **keywords: Any,
) -> Parallel:
    """Return this rank's part of `model`, ready to train; call it on every rank under torchrun.

    Keywords as for `partition`. The number of data-parallel ranks, where `dp` does not say it, is
    what is left of the world: world_size // (tp * cp * ep * pp). A model on the meta device gets
    its initial weights from `seed` and the parameter names, the same under every plan; a real one
    keeps its weights.
    `timeout` bounds the wait for a rank that died or hangs. `shapes`: further shapes of a
    micro-batch, each a mapping from every input's name to its shape, over the same parameters: a
    batch of one is taken wherever one of the first is. The program of a shape is compiled when its
    first batch comes, from `model`, which must stay as it is. Rank 0 warns of what the program's
    `warnings` say.
    With plan="auto" the plan is the fastest predicted for this world and device, for steps of
    `tokens_per_batch` tokens in micro-batches like the example inputs, that the model compiles
    with; what other keywords say is kept. Raises as `partition` does, and
    `PlanError` if the world size does not fit, kernels="triton" cannot run here or the process was
    not started by torchrun.
    """
    given, fields = keywords.pop("plan", None), _plan_keywords(keywords)
    how = Rewriting(**{n: keywords.pop(n) for n in Rewriting.__slots__ if n in keywords})
    # What does not fit is refused before ranks wait for each other.
    if given == AUTO:
        program = _automatic(trace(model, **keywords), fields, how, tokens_per_batch)
        plan = program.plan.replace(passes=(), disable=())
    else:
        plan = settle_kernels(fit_world(make_plan(given, **fields)), choose_device())
        program = _compile(trace(model, **keywords), plan, how)
    mesh = Mesh.create(plan, timeout=timeout)
    if mesh.rank == 0:
        _tell(program.warnings)

    # Each rank compiles for itself; one that found another program would wait for others in vain.
    schedule = schedule_of(plan)  # a file may differ between machines
    mesh.check_alike(
        {
            "the compiled program": program.dump(),
            "the plan": program.plan.to_json(),
            "the schedule": "\n".join(" ".join(map(str, row)) for row in schedule.actions),
        }
    )

    def of_shape(inputs: dict[str, Input]) -> Shape:
        def compile_it() -> Compiled:
            made = compile_like(program, inputs, plan=plan, how=how)
            return Compiled(lower(made), made.flops, made.flops + made.recomputed_flops)

        return Shape(inputs, compile_it)

    return Parallel(
        lower(program),
        schedule,
        mesh,
        model,
        initializer=program.initializer,
        model_flops=program.flops,
        hardware_flops=program.flops + program.recomputed_flops,
        shapes=[of_shape(inputs) for inputs in read_shapes(program.inputs, shapes)],
    )


def _tell(sentences: Sequence[str]) -> None:
    """Warn whoever called `parallelize` of the first sentences, and of how many more there are."""
    for sentence in sentences[:MOST_TOLD]:
        warnings.warn(sentence, stacklevel=3)
    if more := sentences[MOST_TOLD:]:
        warnings.warn(f"and {len(more)} more, which `partition(...).explain()` lists", stacklevel=3)


def _automatic(
    traced: Program, fields: dict[str, Any], how: Rewriting, tokens_per_batch: int | None
) -> Program:
    """Return the program of the fastest plan for this world that `traced` compiles with."""
    device = choose_device()
    read = make_plan(dtype=fields.get("dtype")).dtype
    plans = automatic_plans(
        traced,
        {**fields, "dtype": read},
        world_size=world_size(),
        device=device,
        tokens_per_batch=tokens_per_batch,
    )
    return first_compiled(
        plans,
        lambda plan: _compile(copy_program(traced), settle_kernels(fit_world(plan), device), how),
    )[1]


def _plan_keywords(keywords: dict[str, Any]) -> dict[str, Any]:
    """Take the plan's fields out of `keywords`, but those that `Rewriting` has too."""
    names = set(Plan.__dataclass_fields__) - set(Rewriting.__slots__)
    return {name: keywords.pop(name) for name in names if name in keywords}
