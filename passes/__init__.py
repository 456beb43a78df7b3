"""Passes: each a rewrite of one `Program`, and `lower`, which cuts the result into stages."""

from ilm_compile.passes.activation_checkpoint import ActivationCheckpoint as ActivationCheckpoint
from ilm_compile.passes.base import Pass as Pass
from ilm_compile.passes.cast_bf16 import CastBF16 as CastBF16
from ilm_compile.passes.fuse_kernels import FuseKernels as FuseKernels
from ilm_compile.passes.fuse_residual import FuseResidual as FuseResidual
from ilm_compile.passes.interleave import Interleave as Interleave
from ilm_compile.passes.lower import lower as lower
from ilm_compile.passes.manager import PassReport as PassReport
from ilm_compile.passes.manager import Validator as Validator
from ilm_compile.passes.manager import check_program as check_program
from ilm_compile.passes.manager import communication_bytes as communication_bytes
from ilm_compile.passes.manager import order_passes as order_passes
from ilm_compile.passes.manager import run_passes as run_passes
from ilm_compile.passes.parameters import replace_parameters as replace_parameters
from ilm_compile.passes.pattern import Match as Match
from ilm_compile.passes.pattern import matches as matches
from ilm_compile.passes.pipeline_split import PipelineSplit as PipelineSplit
from ilm_compile.passes.rewrite import insert_after as insert_after
from ilm_compile.passes.rewrite import insert_before as insert_before
from ilm_compile.passes.rewrite import nodes_in as nodes_in
from ilm_compile.passes.rewrite import replace as replace
from ilm_compile.passes.rewrite import replace_call as replace_call
from ilm_compile.passes.rewrite import wrap as wrap
from ilm_compile.passes.sources import save_sources as save_sources
from ilm_compile.passes.standard import standard_passes as standard_passes
from ilm_compile.passes.tensor_parallel import TensorParallel as TensorParallel
