"""The passes of a plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.util import find_spec

import torch

from ilm_compile.errors import PlanError
from ilm_compile.passes.activation_checkpoint import ActivationCheckpoint
from ilm_compile.passes.async_tensor_parallel import AsyncTensorParallel
from ilm_compile.passes.base import Pass
from ilm_compile.passes.cast_bf16 import CastBF16, CastFP16
from ilm_compile.passes.context_parallel import ContextParallel
from ilm_compile.passes.expert_parallel import ExpertParallel
from ilm_compile.passes.fuse_kernels import FuseKernels
from ilm_compile.passes.fuse_loss import FuseLoss
from ilm_compile.passes.fuse_residual import FuseResidual
from ilm_compile.passes.interleave import Interleave
from ilm_compile.passes.master_weights import master_passes
from ilm_compile.passes.pipeline_split import PipelineSplit
from ilm_compile.passes.selective_recompute import SelectiveRecompute
from ilm_compile.passes.share_boundaries import boundary_passes
from ilm_compile.passes.split_backward import SplitBackward
from ilm_compile.passes.stage_choice import ChooseStages
from ilm_compile.passes.tensor_parallel import TensorParallel
from ilm_compile.passes.text import name_in, read_pass
from ilm_compile.program.plan import AUTO, SELECTIVE, Plan
from ilm_compile.program.program import Program
from ilm_compile.schedule import schedule_of


def can_run_triton() -> bool:
    """Whether this machine has a CUDA device and triton."""
    return torch.cuda.is_available() and find_spec("triton") is not None


def fuses(plan: Plan) -> bool:
    """Whether `plan` has fused ops.

    "auto" means that this machine can run their kernels: what is compiled here is what runs here. A
    plan for another machine says "triton", which nothing but `parallelize` asks a GPU for, or
    "torch".
    """
    return plan.kernels == "triton" or (plan.kernels == "auto" and can_run_triton())


def settle_kernels(plan: Plan, device: torch.device) -> Plan:
    """Return `plan` for a run on `device`, with "auto" decided.

    Raises `PlanError` if it demands Triton kernels, which cannot run there.
    """
    can_run = device.type == "cuda" and can_run_triton()
    if plan.kernels == "triton" and not can_run:
        raise PlanError(
            f"parallelize: kernels='triton' needs a CUDA device and triton to run, got device "
            f"{device.type}{'' if find_spec('triton') else ' and no triton'}; use kernels='auto', "
            "which fuses where both are, or 'torch'. partition and verify take 'triton' anywhere"
        )
    return plan if can_run or plan.kernels != "auto" else plan.replace(kernels="torch")


CASTS: dict[str, type[Pass]] = {"bfloat16": CastBF16, "float16": CastFP16}


def plan_passes(program: Program, passes: Sequence[Pass | str] = ()) -> list[Pass]:
    """Return every pass that the plan of `program` and `passes` ask for on this program."""
    own = extra_passes(program.plan, passes)
    needed = [*boundary_passes(program), *master_passes(program)]
    return [*standard_passes(program.plan), *own, *needed]


def extra_passes(plan: Plan, passes: Sequence[Pass | str]) -> list[Pass]:
    """Return the user's `passes` and those that `plan` names, a name that both have once."""
    given = [read_pass(each) for each in passes]
    names = {each.name for each in given}
    # What is given itself need not be readable: its options may be no literals.
    return [read_pass(text) for text in plan.passes if name_in(text) not in names] + given


def with_passes(plan: Plan, passes: Sequence[Pass | str], disable: Collection[str]) -> Plan:
    """Return `plan` with these written down in it."""
    if isinstance(disable, str):
        raise PlanError(f"passes: disable must be a collection of names, got {disable!r}")
    return plan.replace(
        passes=tuple(map(str, extra_passes(plan, passes))),
        disable=tuple(sorted({*plan.disable, *disable})),
    )


def standard_passes(plan: Plan) -> list[Pass]:
    """Return the passes that `plan` asks for; the manager puts them in order."""
    passes: list[Pass] = [
        TensorParallel(
            size=plan.tp,
            hardware=plan.hardware,
            sequence_parallel=plan.sequence_parallel,
            embed_split_hidden=plan.embed_split_hidden,
            constraints=plan.constraints,
        )
    ]
    if plan.ep > 1:
        passes.append(ExpertParallel(size=plan.ep, dispatch=plan.dispatch, hardware=plan.hardware))
    if plan.cp > 1:
        passes.append(
            ContextParallel(size=plan.cp, attention=plan.cp_attention, hardware=plan.hardware)
        )
    if fuses(plan):
        passes += [FuseKernels(), FuseResidual(), FuseLoss()]
    if plan.dtype:
        passes.append(CASTS[plan.dtype]())
    if plan.checkpoint == AUTO:
        passes.append(
            ChooseStages(
                num_stages=plan.num_stages,
                hardware=plan.hardware,
                pp=plan.pp,
                num_chunks=plan.num_chunks,
                num_microbatches=plan.num_microbatches,
                schedule=plan.schedule,
                memory=plan.memory_bytes,
            )
        )
    else:
        passes += [
            ActivationCheckpoint(fraction=float(plan.checkpoint))
            if plan.checkpoint != SELECTIVE
            else ActivationCheckpoint(fraction=True, selective=True),
            PipelineSplit(num_stages=plan.num_stages, hardware=plan.hardware),
        ]
    passes += [
        Interleave(pp=plan.pp, num_chunks=plan.num_chunks, schedule=plan.schedule),
    ]
    if plan.checkpoint in (AUTO, SELECTIVE):
        passes.append(SelectiveRecompute())
    if plan.async_tensor_parallel:
        passes.append(AsyncTensorParallel())
    if schedule_of(plan).splits_backwards:
        passes.append(SplitBackward())
    return passes
