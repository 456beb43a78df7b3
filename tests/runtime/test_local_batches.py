"""Ranks that are given their own rows alone: the same training, and errors on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ilm_compile.errors import BatchError
from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Trainer
from ilm_compile.runtime.data import (
    BatchIterator,
    BatchNumbers,
    BatchRamp,
    DummyDataset,
    Part,
    ValidationBatches,
)
from tests.runtime.handmade import ROWS, SEQ, VOCAB, make_batch, make_model, make_parallel
from tests.support.world import World

DP, TP, PP = {"num_microbatches": 2}, {"tp": 2}, {"pp": 2, "num_microbatches": 2}


class Watched(DummyDataset):
    """Knows which of its rows were read."""

    def __init__(self) -> None:
        super().__init__(num_rows=11, seq_len=SEQ, vocab_size=VOCAB)
        self.read: list[int] = []

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        self.read += rows.tolist()
        return super().batch(rows)


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# what is read


@pytest.mark.parametrize("num_workers", [0, 1])
def test_parts_make_up_the_batches_over_ramp_skip_and_epochs(num_workers: int) -> None:
    options: dict[str, Any] = {
        "global_batch_size": 8,
        "ramp": BatchRamp(3, 2, 1),
        "skip": BatchNumbers(((1, 1),)),
        "num_workers": num_workers,
    }
    whole = BatchIterator(Watched(), **options)
    parts = [BatchIterator(Watched(), part=Part(rank, 4), **options) for rank in range(4)]
    for _ in range(5):
        expected, found = next(whole), joined([next(part) for part in parts])
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert {part.num_rows for part in parts} == {whole.num_rows}
    assert all(part.state_dict() == whole.state_dict() for part in parts)


def test_parts_make_up_the_batches_of_a_validation() -> None:
    whole = ValidationBatches(Watched(), global_batch_size=8)
    parts = [ValidationBatches(Watched(), global_batch_size=8, part=Part(r, 2)) for r in range(2)]
    for expected, *own in zip(whole, *parts, strict=True):
        found = joined(own)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_no_rank_reads_more_than_its_share(size: int) -> None:
    data = Watched()
    batches = BatchIterator(data, global_batch_size=8, part=Part(size - 1, size))
    validation = ValidationBatches(data, global_batch_size=8, part=Part(size - 1, size))
    next(batches)
    assert len(data.read) == 8 // size
    next(iter(validation))
    assert len(data.read) == 2 * 8 // size


def test_another_number_of_parts_goes_on_with_the_rows_that_come_next() -> None:
    whole, before = (BatchIterator(Watched(), global_batch_size=4) for _ in range(2))
    next(whole), next(before)
    parts = [BatchIterator(Watched(), global_batch_size=8, part=Part(r, 2)) for r in range(2)]
    for part in parts:
        part.load_state_dict(before.state_dict())
    assert torch.equal(
        joined([next(part) for part in parts])["input_ids"],
        joined([next(whole), next(whole)])["input_ids"],
    )


@pytest.mark.parametrize("part", [Part(0, 3), Part(2, 2), Part(-1, 2)])
def test_a_part_that_is_none_is_refused(part: Part) -> None:
    with pytest.raises(ValueError, match=f"got part {part.rank} of {part.size}"):
        BatchIterator(Watched(), global_batch_size=8, part=part)


# what is trained


def train(rank: int, plan: dict[str, Any], is_local: bool) -> tuple[Any, ...]:
    """Losses, tokens counted, and gradients on rank 0, of batches with unequal masks."""
    parallel = make_parallel(Plan(**plan), make_model())
    layout = parallel.step_inputs.layout
    batches = [make_batch(ROWS * layout.num_slices, seed=seed) for seed in range(2)]
    if layout.dp.size > 1:  # none on the first rank
        batches[0]["labels"][: ROWS * layout.num_microbatches] = -100
    given = [layout.own(batch) for batch in batches] if is_local else batches
    alone = make_model()(**batches[0]).item()
    trainer = Trainer(parallel, lr=0.1)
    history = trainer.fit(given, 2, progress=False, batch_is_local=is_local)
    _, labels, loss = trainer.execute_schedule(
        given[1], batch_is_local=is_local, return_output_label=True
    )
    assert labels is None or torch.equal(labels, layout.own(batches[1])["labels"])
    gradients = {name: grad.tolist() for name, grad in parallel.full_gradients().items()}
    assert history[0].loss == pytest.approx(alone, rel=1e-10)
    return [m.loss for m in history], trainer.num_tokens, loss.item(), gradients


@pytest.mark.parametrize("plan", [DP, TP, PP], ids=["dp", "tp", "pp"])
def test_the_training_is_the_same_bit_for_bit(world2: World, plan: dict[str, Any]) -> None:
    expected = world2.run(train, plan, False)
    assert world2.run(train, plan, True) == expected


def attempt(rank: int, plan: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    """What this rank says to its own rows, of which `cases` says what is wrong by rank."""
    parallel = make_parallel(Plan(**plan), make_model())
    layout = parallel.step_inputs.layout
    batch = dict(layout.own(make_batch(ROWS * layout.num_slices, seed=1)))
    for name, value in cases[rank].items():
        batch[name] = batch[name][:-1] if value is None else batch[name].clone().fill_(value)
    try:
        parallel.execute_schedule(batch, batch_is_local=True)
    except BatchError as error:
        return f"{type(error).__name__}: {error}"
    return ""


OK: dict[str, Any] = {}
NO_TARGETS = {"labels": -100}
WRONG = {
    "no target on any rank": (DP, [NO_TARGETS, NO_TARGETS], "NoTargetsError: batch: expected at"),
    "other rows under tp": (
        TP,
        [OK, {"input_ids": 1}],
        "expected the same rows on the ranks of one data-parallel rank, got another input_ids on "
        "rank 1 than on rank 0",
    ),
    "other rows under pp": (PP, [{"labels": 1}, OK], "got another labels on rank 1 than on rank 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rows_are_refused_on_every_rank(world2: World, case: str) -> None:
    plan, cases, message = WRONG[case]
    said = world2.run(attempt, plan, cases)
    assert said[0] == said[1]
    assert message in said[0]


@pytest.mark.parametrize("cases", [[OK, OK], [NO_TARGETS, OK]], ids=["all", "one without targets"])
def test_other_rows_on_other_data_parallel_ranks_are_right(world2: World, cases: Any) -> None:
    assert world2.run(attempt, DP, cases) == ["", ""]


@pytest.mark.parametrize("plan", [DP, TP], ids=["dp", "tp"])
def test_an_error_in_the_rows_of_one_rank_is_raised_on_all(
    world2: World, plan: dict[str, Any]
) -> None:
    rows = ROWS * plan.get("num_microbatches", 1)
    for words in world2.run(attempt, plan, [OK, {"labels": None}]):
        assert f"rank 1: batch: expected labels of shape ({rows}, {SEQ})" in words
        assert f"got ({rows - 1}, {SEQ})" in words
        assert "batch_is_local=False takes all rows" in words
