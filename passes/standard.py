"""The passes of a plan."""

from __future__ import annotations

from ilm_compile.passes.activation_checkpoint import ActivationCheckpoint
from ilm_compile.passes.base import Pass
from ilm_compile.passes.cast_bf16 import CastBF16
from ilm_compile.passes.interleave import Interleave
from ilm_compile.passes.pipeline_split import PipelineSplit
from ilm_compile.passes.tensor_parallel import TensorParallel
from ilm_compile.program.plan import Plan


def standard_passes(plan: Plan) -> list[Pass]:
    """Return the passes that `plan` asks for; the manager puts them in order."""
    passes: list[Pass] = [
        TensorParallel(
            size=plan.tp,
            sequence_parallel=plan.sequence_parallel,
            embed_split_hidden=plan.embed_split_hidden,
            constraints=plan.constraints,
        )
    ]
    if plan.dtype:
        passes.append(CastBF16())
    passes += [
        ActivationCheckpoint(fraction=plan.checkpoint),
        PipelineSplit(num_stages=plan.num_stages),
        Interleave(pp=plan.pp, num_chunks=plan.num_chunks),
    ]
    return passes
