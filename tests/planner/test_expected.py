"""What a whole step of a program is expected to take: the schedule, gradients and the optimizer."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import ilm_compile
from ilm_compile.cli.entry import main
from ilm_compile.cost import HARDWARE, Hardware
from ilm_compile.cost.data_parallel import software_of
from ilm_compile.cost.sizes import VEE, StepPlan
from ilm_compile.models import internlm2_tiny
from ilm_compile.planner import Expected, Question, expect, simulate_step
from ilm_compile.planner.fitting import candidate_of, fit_of
from ilm_compile.planner.model_sizes import sizes_of
from ilm_compile.program.program import Program

H100, CPU = HARDWARE["h100"], HARDWARE["cpu"]
PIPELINE: dict[str, Any] = {"pp": 2, "num_microbatches": 4}


@pytest.fixture(scope="module")
def traced() -> Program:
    return ilm_compile.trace(internlm2_tiny())


def expected(traced: Program, hardware: Hardware, **plan: Any) -> Expected:
    return expect(ilm_compile.compile(traced, **plan), hardware)


def test_a_step_is_the_schedule_and_the_optimizer(traced: Program) -> None:
    program = ilm_compile.compile(traced, **PIPELINE)
    found, step = expect(program, CPU), simulate_step(program, CPU)
    assert found.compute == step.seconds
    assert found.gradients == 0
    assert found.seconds == pytest.approx(step.seconds + found.optimizer)
    assert found.memory == (step.peak(0), step.peak(1))
    rows, tokens = next(iter(traced.inputs.values())).shape
    assert found.tokens == 4 * rows * tokens
    assert found.mfu == pytest.approx(4 * program.flops / found.seconds / (2 * 50e9))


def test_ranks_that_share_cores_wait_for_each_other(traced: Program) -> None:
    few, many = (
        expected(traced, replace(CPU, cores=cores), **PIPELINE).compute for cores in (1, 2)
    )
    step = simulate_step(ilm_compile.compile(traced, **PIPELINE), CPU)
    assert many == step.seconds
    assert few == pytest.approx(sum(step.simulation.busy))
    assert few > many


@pytest.mark.parametrize(("zero", "times"), [(1, 1), (3, 8)])
def test_parameters_are_gathered_as_zero_says(traced: Program, zero: int, times: int) -> None:
    # Links without latency: what is moved is in proportion to bytes.
    links = {kind: dict(sizes) for kind, sizes in CPU.links.items()}
    links["reduce_scatter"] = {2: replace(links["reduce_scatter"][2], latency_s=0, s_per_byte=0)}
    gathers = replace(links["all_gather"][2], latency_s=0, s_per_byte=1)
    links["all_gather"] = {2: gathers}
    machine = replace(CPU, links=links, memory_bandwidth=1e30)
    found = expected(traced, machine, dp=2, zero=zero, num_microbatches=4)
    elements = sum(p.numel() for p in internlm2_tiny().parameters())
    assert found.gradients == pytest.approx(times * elements * 4 / 2)
    assert found.num_ranks == 2


def test_a_gpu_hides_gradients_behind_its_compute(traced: Program) -> None:
    alone, hidden = (
        expected(traced, replace(H100, cores=cores), dp=2, num_microbatches=4).gradients
        for cores in (2, 0)
    )
    assert 0 < hidden < alone


def wide() -> torch.nn.Module:
    return internlm2_tiny(
        **{"hidden_size": 4096, "num_attention_heads": 32, "num_kv_attention_heads": 8},
        **{"num_layers": 4, "vocab_size": 32000, "mlp_ratio": 3.5, "max_seq_len": 4096},
    )


@pytest.fixture(scope="module")
def large() -> Program:
    inputs = {name: ((1, 4096), torch.int64) for name in ("input_ids", "labels")}
    with torch.device("meta"):
        model = wide()
    return ilm_compile.trace(model, example_inputs=inputs)


@pytest.mark.parametrize(
    "wanted",
    [
        {"dp": 8, "zero": 3},
        {"dp": 8, "zero": 1},
        {"tp": 4, "pp": 1, "dp": 2},
        {"tp": 1, "pp": 2, "schedule": "1f1b", "dp": 4},
        {"tp": 2, "pp": 2, "schedule": "v_half", "dp": 2},
    ],
    ids=str,
)
def test_what_a_search_predicts_is_what_its_plan_is_expected_to_take(
    large: Program, wanted: dict[str, Any]
) -> None:
    question = Question(
        **{"sizes": sizes_of(large), "gpus": 8, "hardware": H100, "sequences": 128, "seq": 4096},
        **{"memory_bytes": H100.usable_bytes, "software": software_of(H100)},
    )
    shape = {"tp": 1, "pp": 1, "schedule": "1f1b", "zero": 1} | wanted
    chunks = 2 if shape["schedule"] in VEE else 1
    plan = StepPlan(
        **{"seq": 4096, "micro_batch": 1, "num_microbatches": 128 // shape["dp"]},
        **{"sequence_parallel": shape["tp"] > 1, "chunks": chunks, **shape},
    )
    candidate = candidate_of(question, fit_of(question, plan, is_own=False))
    chosen = candidate.to_plan().replace(kernels="triton", hardware="h100")
    found = expect(ilm_compile.compile(large, plan=chosen))
    assert found.seconds == pytest.approx(candidate.time.total, rel=0.06)


def test_dtype_decides_the_peak(traced: Program) -> None:
    found = expected(traced, H100, dtype=torch.bfloat16)
    assert found.mfu == pytest.approx(found.flops / found.seconds / 989e12)


def test_explain_says_what_to_expect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "internlm2_tiny", "--tp", "2", "--hardware", "a100-80g"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("expected on 2 x a100-80g: ")
    assert " tokens/s, MFU " in last
    assert last.endswith(" GiB on the fullest rank, of 76.4")
