"""What a step's micro-batches are given: rows, numbers of targets, dropout seeds."""

import pytest
import torch

from ilm_compile.program.dropout import SEED
from ilm_compile.program.plan import Plan
from ilm_compile.runtime.mesh import Axis
from ilm_compile.runtime.step_inputs import StepInputs
from tests.runtime.handmade import ROWS, lower_by_hand, make_batch, make_model, make_parallel

CPU = torch.device("cpu")


def inputs(rank: int = 0, dp: int = 1, *, microbatches: int = 2, seed: int = 5) -> StepInputs:
    lowered = lower_by_hand(Plan(num_microbatches=microbatches, seed=seed))
    axis = Axis(rank, dp)
    return StepInputs.of(
        lowered, lowered.stages, num_microbatches=microbatches, dp=axis, device=CPU
    )


def seeds(given: StepInputs, step: int) -> list[int]:
    batch = make_batch(ROWS * given.layout.num_slices)
    return [int(seed) for seed in given.of_step(batch, step)[SEED]]


def test_dropout_seeds_are_those_of_the_place_in_the_training_under_every_plan() -> None:
    alone = seeds(inputs(microbatches=4), 3)
    split = [seed for rank in range(2) for seed in seeds(inputs(rank, 2), 3)]
    assert split == alone


def test_dropout_seeds_never_come_twice() -> None:
    drawn = [s for seed in (5, 6) for step in range(3) for s in seeds(inputs(seed=seed), step)]
    assert len(set(drawn)) == len(drawn) == 12


@pytest.mark.parametrize("rank", [0, 1])
def test_every_microbatch_is_given_its_rows_and_its_share_of_all_targets(rank: int) -> None:
    batch = make_batch(ROWS * 4)
    given = inputs(rank, 2).of_step(batch, 0)
    rows = batch["input_ids"].view(2, 2, ROWS, -1)[rank]
    assert torch.equal(torch.stack(given["input_ids"]), rows)
    assert torch.equal(torch.stack(given["labels"]), batch["labels"].view(2, 2, ROWS, -1)[rank])
    share = int((batch["labels"] != -100).sum()) / 4
    assert [count.item() for count in given["num_targets"]] == [share, share]


def test_counts_are_exact_in_the_dtype_of_a_float64_model() -> None:
    batch = make_batch(ROWS * 3)
    (count, *_) = inputs(microbatches=3).of_step(batch, 0)["num_targets"]
    assert count.dtype == torch.float64
    assert count.item() == int((batch["labels"] != -100).sum()) / 3


def test_only_training_steps_are_counted() -> None:
    parallel = make_parallel(Plan(), make_model())
    batch = make_batch(ROWS)
    for _ in range(2):
        parallel.execute_schedule(batch)
        parallel.execute_schedule(batch, forward_only=True)
    assert parallel.num_steps == 2
