"""checkpoint="auto": stages and recompute chosen together, equal to the model, within memory."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import ilm_compile
from ilm_compile.errors import PlanError
from ilm_compile.models import internlm2_tiny
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program

MIB = 2**20
WIDE = {"num_layers": 6, "hidden_size": 64, "vocab_size": 2048, "max_seq_len": 64}
SIZES: dict[str, Any] = {"pp": 3, "num_microbatches": 6, "hardware": "cpu"}


@cache
def model() -> nn.Module:
    return internlm2_tiny(**WIDE)


@cache
def traced() -> Program:
    return ilm_compile.trace(model())


def compiled(memory: float | None, **plan: Any) -> Program:
    size = None if memory is None else f"{memory}MiB"
    return ilm_compile.compile(traced(), **{**SIZES, **plan}, checkpoint="auto", memory=size)


def peaks(program: Program) -> list[float]:
    """In MiB, as they are said."""
    line = next(d for d in program.decisions if "predicted peaks" in d)
    return [float(part.split()[0]) for part in line.partition("ranks: ")[2].split(", ")]


def recomputed(program: Program) -> list[int]:
    """How many blocks run again, by the stage in which the block begins."""
    stages: dict[int, int] = {}
    for node in program.calls():
        if "stage" in node.meta:
            stages.setdefault(node.meta["region"], node.meta["stage"])
    found = [0] * program.plan.num_stages
    for index, region in enumerate(program.regions):
        found[stages.get(index, 0)] += region.recompute or region.selective
    return found


def test_with_room_nothing_runs_again() -> None:
    assert sum(recomputed(compiled(None))) == 0


def test_it_fits_and_the_first_stages_run_more_again() -> None:
    most = max(peaks(compiled(None)))
    program = compiled(0.9 * most)
    assert max(peaks(program)) <= 0.9 * most
    again = recomputed(program)
    assert again[0] > again[-1]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_passes_that_follow_leave_the_peaks_as_they_were_chosen(
    schedule: str, kernels: str, dtype: torch.dtype | None
) -> None:
    """With kernels, the head and its loss are one call, whose logits need no room.

    Within 1%: rotary tables, which every stage makes for itself, are counted for the first alone.
    """
    plan: dict[str, Any] = {"schedule": schedule, "kernels": kernels, "dtype": dtype}
    program = compiled(0.9 * max(peaks(compiled(None, **plan))), **plan)
    found = ilm_compile.simulate_step(program)
    now = [found.peak(rank) / MIB for rank in range(program.plan.pp)]
    assert now == pytest.approx(peaks(program), rel=1e-2)


def test_what_cannot_fit_is_refused_with_the_bytes() -> None:
    with pytest.raises(PlanError, match=r"choose-stages: a rank needs .* MiB with every block"):
        compiled(1)


EQUAL: dict[str, dict[str, Any]] = {
    "pp": {"pp": 2},
    "one stage": {"pp": 1},
    "chunks": {"pp": 2, "num_chunks": 2},
    "tp": {"pp": 2, "tp": 2},
    "W": {"pp": 2, "schedule": "zb_h1"},
}


@pytest.mark.parametrize("plan", EQUAL)
def test_every_plan_is_equal_to_the_model(plan: str) -> None:
    small = internlm2_tiny(num_layers=4, vocab_size=64, hidden_size=32, max_seq_len=32).double()
    options: dict[str, Any] = {
        "example_inputs": {name: ((8, 32), torch.int64) for name in ("input_ids", "labels")},
        "checkpoint": "auto",
        **SIZES,
        "num_microbatches": 4,
        **EQUAL[plan],
    }
    most = max(peaks(ilm_compile.partition(small, **options)))
    options["memory"] = f"{0.8 * most:.3f}MiB"
    assert sum(recomputed(ilm_compile.partition(small, **options)))
    ilm_compile.verify(small, **options).raise_if_failed()


def test_memory_of_parameters_is_shared_by_data_parallel_ranks() -> None:
    alone, many = compiled(None), compiled(None, dp=8, zero=3)
    assert max(peaks(many)) < max(peaks(alone))


WRONG = {
    "memory alone": ({"memory": "1GiB"}, 'is what checkpoint="auto" keeps to'),
    "no size": ({"checkpoint": "auto", "memory": "much"}, "plan: memory must be a number of bytes"),
    "nothing": ({"checkpoint": "auto", "memory": "0GiB"}, "plan: memory must be a number of bytes"),
    "another word": ({"checkpoint": "all"}, "plan: checkpoint must be False, True, a fraction"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_plans_are_refused(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(PlanError, match=message):
        Plan(**options)


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("1.5 GB", 1_500_000_000), (7, 7)]
)
def test_sizes_are_read(text: str | int, size: float) -> None:
    assert Plan(checkpoint="auto", memory=text).memory_bytes == size


def test_bf16_is_in_the_prediction() -> None:
    whole, half = compiled(None), compiled(None, dtype=torch.bfloat16)
    assert max(peaks(half)) < max(peaks(whole))
