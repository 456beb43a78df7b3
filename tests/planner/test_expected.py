"""What a whole step of a program is expected to take: the schedule, gradients and the optimizer."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import ilm_compile
from ilm_compile.cli.entry import main
from ilm_compile.cost import HARDWARE, Hardware
from ilm_compile.models import internlm2_tiny
from ilm_compile.planner import Expected, expect, simulate_step
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


def test_dtype_decides_the_peak(traced: Program) -> None:
    found = expected(traced, H100, dtype=torch.bfloat16)
    assert found.mfu == pytest.approx(found.flops / found.seconds / 989e12)


def test_explain_says_what_to_expect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "internlm2_tiny", "--tp", "2", "--hardware", "a100-80g"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("expected on 2 x a100-80g: ")
    assert " tokens/s, MFU " in last
    assert last.endswith(" GiB on the fullest rank, of 76.4")
