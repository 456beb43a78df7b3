"""What float64 cannot tell: where a program rounds, and where the bounds of its clamps are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilm_compile.errors import ProgramError
from ilm_compile.passes import insert_after, run_passes, standard_passes
from ilm_compile.passes.master_weights import MasterWeights
from ilm_compile.program.copy import copy_program
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.proof.bounds import check_bounds
from ilm_compile.proof.dtypes import check_dtypes
from ilm_compile.proof.static import check_variables
from tests.proof.small import INPUTS, make_model

aten = torch.ops.aten
BF16 = {"tp": 2, "dtype": "bfloat16"}


def compiled(model: nn.Module, **plan: object) -> tuple[Program, Program]:
    settled = Plan(num_microbatches=2).replace(**plan)
    traced = replace(trace(model.float(), example_inputs=INPUTS), plan=settled)
    program = copy_program(traced)
    run_passes(program, standard_passes(settled))
    return traced, program


def round_twice(program: Program, target: object) -> None:
    """Round the result of the last call of `target` to bfloat16 and back."""
    node = list(program.graph.find_nodes(op="call_function", target=target))[-1]
    users = list(node.users)
    low = insert_after(program, node, aten.to.dtype, node, torch.bfloat16)
    back = insert_after(program, low, aten.to.dtype, low, torch.float32)
    node.replace_all_uses_with(back, delete_user_cb=users.__contains__)


@pytest.mark.parametrize("target", [aten.cos.default, aten.add.Tensor], ids=str)
def test_a_cast_without_a_compute_dtype_is_refused(target):
    traced, program = compiled(make_model("internlm2"), tp=2)
    check_dtypes(traced, program)
    round_twice(program, target)
    with pytest.raises(ProgramError, match=r"gives \[torch.bfloat16\]; expected no fewer digits"):
        check_dtypes(traced, program)


def test_under_a_compute_dtype_rotary_tables_are_not_rounded():
    traced, program = compiled(make_model("internlm2"), **BF16)
    check_dtypes(traced, program)
    round_twice(program, aten.cos.default)
    with pytest.raises(ProgramError, match="rounds what aten::to reads"):
        check_dtypes(traced, program)


def test_a_value_of_another_dtype_than_the_model_s_is_refused():
    traced, program = compiled(make_model("internlm2"))
    node = next(iter(program.graph.find_nodes(op="call_function", target=aten.rms_norm.default)))
    node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    with pytest.raises(ProgramError, match=r"expected \[torch.float32\], as in the model"):
        check_dtypes(traced, program)


@pytest.mark.parametrize("name", ["internlm", "internlm2", "skip", "hf-llama", "hf-gpt2"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_the_casts_of_the_compiler_are_accepted(name, kernels):
    """Those of GPT-2 too, whose two tables are summed in parts and rounded once they are whole."""
    check_dtypes(*compiled(make_model(name), **BF16, kernels=kernels))


class Clamped(nn.Module):
    """A model with a bound that ordinary numbers do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.embed(input_ids).clamp(min=-50.0, max=50.0))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_another_bound_is_refused():
    traced, program = compiled(Clamped())
    check_bounds(traced, program)
    [node] = program.graph.find_nodes(op="call_function", target=aten.clamp.default)
    node.update_arg(2, 40.0)
    with pytest.raises(ProgramError, match=r"bounds \[-50.0, 40.0\]; expected \[-50.0, 50.0\]"):
        check_bounds(traced, program)


class Windowed(nn.Module):
    """A model whose attention looks back over six tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        at = torch.arange(x.shape[1], device=x.device)
        is_seen = (at[:, None] >= at) & (at > at[:, None] - 6)
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=is_seen)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_another_window_is_refused_whatever_the_length_of_rows():
    traced, program = compiled(Windowed())
    check_bounds(traced, program)
    [node] = (n for n in program.calls() if n.args[1:] == (6,))
    node.update_arg(1, 7)
    with pytest.raises(ProgramError, match=r"bounds \[7\]; expected \[6\]"):
        check_bounds(traced, program)


def test_master_weights_are_accepted_and_a_cast_to_another_dtype_is_not():
    settled = Plan(tp=2, num_microbatches=2)
    traced = replace(trace(make_model("internlm2").bfloat16(), example_inputs=INPUTS), plan=settled)
    program = copy_program(traced)
    run_passes(program, [*standard_passes(settled), MasterWeights()])
    check_variables(traced, program)
    check_dtypes(traced, program)
    cast = next(n for n in program.calls() if n.args[1:] == (torch.bfloat16,))
    cast.update_arg(1, torch.float16)
    cast.meta["val"] = cast.meta["val"].to(torch.float16)
    with pytest.raises(ProgramError, match="no fewer digits than its inputs have"):
        check_dtypes(traced, program)


def test_a_parameter_in_float32_that_is_none_in_the_model_is_refused():
    traced, program = compiled(make_model("internlm2"), tp=2)
    next(v for v in program.variables.values() if v.is_parameter).dtype = torch.float64
    with pytest.raises(ProgramError, match=r"has dtype torch.float64; the model has torch.float32"):
        check_variables(traced, program)
