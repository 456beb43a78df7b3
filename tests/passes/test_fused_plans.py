"""Plans with fused ops: proven, in bfloat16 no worse than plain calls, and left to CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ilm_compile
from ilm_compile.errors import PlanError
from ilm_compile.passes import FuseKernels, FuseResidual
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.values import is_tuple
from ilm_compile.proof import zoo as small
from ilm_compile.proof.check_pass import check_pass
from tests.program.execute import run_program
from tests.support.fused import (
    INPUTS,
    NORM,
    QKV,
    ROTARY,
    count,
    make_model,
    partitioned,
    traced_model,
)

aten, ilm = torch.ops.aten, torch.ops.ilm


@pytest.mark.parametrize("name", ["InternLM2", "Llama", "GPT-2", "Cohere", "Gemma-2", "GLM-4"])
@pytest.mark.parametrize("plan", [{"tp": 2}, {"tp": 2, "pp": 2}], ids=str)
def test_fused_plan_is_proven(name: str, plan: dict[str, int]) -> None:
    model = traced_model(name)[0]
    report = ilm_compile.verify(model, example_inputs=INPUTS, kernels="triton", **plan)
    report.raise_if_failed()
    assert report.max_grad_error < 1e-10


@pytest.mark.parametrize("name", ["InternLM2", "InternLM2, sorted", "Llama", "GPT-2", "Cohere"])
def test_fused_plan_in_bfloat16_is_proven(name: str) -> None:
    model = make_model(name).float()
    report = ilm_compile.verify(
        model, example_inputs=INPUTS, kernels="triton", dtype=torch.bfloat16
    )
    report.raise_if_failed()
    assert "precision" in [check.name for check in report.checks]


def test_more_ranks_than_key_heads_leave_the_rotation_unfused() -> None:
    model = traced_model("InternLM2")[0]
    report = ilm_compile.verify(model, example_inputs=INPUTS, kernels="triton", tp=4)
    report.raise_if_failed()
    program = partitioned(tp=4)
    assert not {QKV, ROTARY} & count(program).keys()
    assert any("tp=4 does not divide its 2 key heads" in d for d in program.decisions)


def test_a_norm_over_all_heads_stays_divided() -> None:
    program = partitioned("OLMo-2", tp=2)
    assert count(program)[NORM] == 4  # 8 without tensor parallelism
    assert any("it norms all heads at once" in d for d in program.decisions)


@pytest.mark.parametrize("name", ["internlm2", "hf-llama"])
def test_fuse_kernels_keeps_its_word(name: str) -> None:
    plans = [Plan(num_microbatches=2, tp=2, pp=2, kernels="torch")]
    report = check_pass(FuseKernels(), models={name: small.MODELS[name]}, plans=plans)
    report.raise_if_failed()
    assert all(case.changed and case.gradient_error < 1e-10 for case in report.cases)


def test_fuse_residual_keeps_its_word() -> None:
    plans = [Plan(num_microbatches=2, tp=2, pp=2, checkpoint=True, kernels="triton")]
    models = {"internlm2": small.MODELS["internlm2"]}
    report = check_pass(FuseResidual(), models=models, plans=plans)
    report.raise_if_failed()
    assert report.cases[-1].changed


def half(name: str, kernels: str) -> Program:
    """The float32 model with bfloat16 casts."""
    return ilm_compile.partition(
        make_model(name).float(), example_inputs=INPUTS, kernels=kernels, dtype=torch.bfloat16
    )


def test_fused_ops_of_a_bfloat16_program_need_fewer_casts_and_keep_float32_weights() -> None:
    plain, program = (half("InternLM2", kernels) for kernels in ("torch", "triton"))
    casts = [
        len(p.graph.find_nodes(op="call_function", target=aten.to.dtype)) for p in (plain, program)
    ]
    assert casts[1] < casts[0]
    fused_ops = [node for node in program.calls() if is_tuple(node)]
    assert {v.dtype for n in fused_ops for v in n.meta["val"]} == {torch.bfloat16}
    for node in program.graph.find_nodes(op="call_function", target=ilm.add_rms_norm.default):
        assert node.args[2].op == "get_attr"
        assert node.args[2].meta["val"].dtype == torch.float32


def test_what_was_float32_between_two_fused_ops_still_is() -> None:
    """Qwen3 turns what a norm gives: plain calls round once, after both."""
    program = half("Qwen3", "triton")
    for node in program.graph.find_nodes(op="call_function", target=ilm.rotary.default):
        assert {value.dtype for value in node.meta["val"]} == {torch.float32}


@pytest.mark.parametrize("name", ["InternLM2", "Llama", "Qwen3", "Gemma"])
def test_bfloat16_loss_is_as_near_to_float32_as_that_of_the_plain_calls(name: str) -> None:
    model = make_model(name).float()
    ids = torch.arange(32).reshape(2, 16) % small.VOCAB
    batch = {"input_ids": ids, "labels": ids.flip(1)}
    exact, plain, result = (
        run_program(
            ilm_compile.partition(model, example_inputs=INPUTS, kernels=kernels, dtype=dtype),
            model,
            batch,
        )[1]
        for kernels, dtype in (
            ("torch", None),
            ("torch", torch.bfloat16),
            ("triton", torch.bfloat16),
        )
    )

    def error(gradients: dict[str, Tensor]) -> float:
        wrong = [(gradients[n] - g).norm() / g.norm() for n, g in exact.items()]
        return float(torch.stack(wrong).mean())

    assert error(result) < 1.1 * error(plain)


def test_auto_leaves_a_cpu_program_as_it_is() -> None:
    model = traced_model("InternLM2")[0]
    auto, plain = (
        ilm_compile.partition(model, example_inputs=INPUTS, kernels=kernels)
        for kernels in ("auto", "torch")
    )
    assert count(auto) == {} or torch.cuda.is_available()
    assert count(plain) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can run the kernels")
def test_triton_without_cuda_is_refused_before_work_starts() -> None:
    with pytest.raises(PlanError, match="needs a CUDA device and triton to run, got device cpu"):
        ilm_compile.parallelize(traced_model("InternLM2")[0], kernels="triton")


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(PlanError, match=r"kernels must be one of .* got 'cuda'"):
        Plan(kernels="cuda")
