"""One step of a program, simulated: its seconds, its memory over time, and its pictures."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import ilm_compile
from ilm_compile.cli.entry import main
from ilm_compile.cost import HARDWARE, saved_bytes
from ilm_compile.cost.constants import SOFTWARE
from ilm_compile.models import internlm2_tiny
from ilm_compile.planner import SimulatedStep, simulate_step
from ilm_compile.program.program import Program
from ilm_compile.rewrite.node_cost import step_seconds

PIPELINE: dict[str, Any] = {"pp": 2, "num_microbatches": 4}


@cache
def traced() -> Program:
    return ilm_compile.trace(internlm2_tiny())


def simulated(**plan: Any) -> tuple[Program, SimulatedStep]:
    program = ilm_compile.compile(traced(), **plan)
    return program, simulate_step(program)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_one_rank_takes_the_seconds_of_its_nodes(checkpoint: bool) -> None:
    program = ilm_compile.compile(traced(), num_microbatches=3, checkpoint=checkpoint)
    step = simulate_step(program, HARDWARE["cpu"])
    seconds = step_seconds(program, HARDWARE["cpu"])
    stages = [node for node in program.calls() if not node.meta.get("clone")]
    assert step.seconds == pytest.approx(3 * sum(seconds[node] for node in stages))
    assert step.bubble == pytest.approx(0)


@pytest.mark.parametrize(("checkpoint", "again"), [(False, 0), ("selective", 0.5), (True, 1)])
def test_a_host_cannot_start_blocks_faster_than_it_can(
    checkpoint: bool | str, again: float
) -> None:
    host = SOFTWARE["ilm_compile"]
    _, step = simulated(**PIPELINE, checkpoint=checkpoint)
    forward = 2 * host.host_layer_s  # of the two blocks of a stage, which are tiny
    backward = forward * (host.host_backward + again)
    for times in step.times:
        assert times.forward == pytest.approx(forward, rel=0.01)
        assert times.backward + times.weight >= backward * 0.999


@pytest.mark.parametrize("checkpoint", [False, "selective", True], ids=str)
def test_memory_is_what_micro_batches_in_flight_keep(checkpoint: bool | str) -> None:
    program, step = simulated(**PIPELINE, checkpoint=checkpoint)
    saved = saved_bytes(program)
    of_stage = [sum(v for (s, _), v in saved.items() if s == stage) for stage in (0, 1)]
    assert [held.kept for held in step.held] == of_stage
    assert step.peak(0) == step.static[0] + of_stage[0] + step.held[0].backward
    assert step.peak(1) == step.static[1] + step.held[1].backward
    assert step.memory(0)[-1][1] == step.static[0]  # nothing is left


def test_what_is_made_again_is_held_while_its_backward_runs() -> None:
    plain, again = (simulated(**PIPELINE, checkpoint=all_of)[1].held[0] for all_of in (False, True))
    assert again.kept < plain.kept / 4
    assert again.backward > again.kept + plain.kept / 2  # of the two blocks of the stage, one
    assert again.backward < plain.backward


def test_parameters_count_on_the_rank_that_holds_them() -> None:
    program, step = simulated(**PIPELINE)
    elements = sum(v.shape.numel() for v in map(lambda p: p, internlm2_tiny().parameters()))
    assert sum(step.static) == elements * 4 * 4  # weight, gradient and two moments in float32
    assert len(step.static) == program.plan.pp


def test_split_backwards_idle_less() -> None:
    plain, split = (simulated(**PIPELINE, schedule=name)[1] for name in ("1f1b", "zb_h1"))
    assert split.bubble < plain.bubble
    assert split.seconds < plain.seconds


def test_grid_is_in_proportion() -> None:
    _, step = simulated(**PIPELINE)
    first, *rows = step.grid(60).splitlines()
    assert first == f"{step.seconds * 1e3:.3f} ms, {step.bubble:.1%} idle"
    cells = [row.split()[2] for row in rows]
    assert [len(row) for row in cells] == [60, 60]
    idle = sum(row.count(".") for row in cells) / 120
    assert idle == pytest.approx(step.bubble, abs=0.06)


def test_command_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    command = ["explain", "internlm2_tiny", "--pp", "2", "--num-microbatches", "4"]
    assert main([*command, "--trace", str(path)]) == 0
    assert "rank 1 " in capsys.readouterr().out
    events = json.loads(path.read_text())["traceEvents"]
    computes = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in computes if event["tid"] == 0} == {
        f"0{kind}{m}" for kind in "FB" for m in range(4)
    }
    assert max(e["ts"] + e["dur"] for e in computes) == pytest.approx(
        simulated(**PIPELINE)[1].seconds * 1e6
    )
    assert any(event["ph"] == "C" for event in events)
