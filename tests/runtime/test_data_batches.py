"""Which rows a batch has: ramp-up, skipping, validation, and going on where a run stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data import (
    BatchIterator,
    BatchNumbers,
    BatchRamp,
    PackedText,
    TokenDataset,
    ValidationBatches,
    pack_documents,
    write_shard,
)

NUM_ROWS = 12


def dataset(num_rows: int = NUM_ROWS) -> PackedText:
    """Rows that can be told apart by their first tokens."""
    return pack_documents([f"{row:03d}" for row in range(num_rows)], seq_len=4)


def longer() -> PackedText:
    """As many rows of a token more."""
    return pack_documents([f"{row:04d}" for row in range(NUM_ROWS)], seq_len=5)


def names(batch: dict[str, Tensor]) -> list[int]:
    """The numbers of the rows that have targets."""
    real = (batch["labels"] != -100).any(1)
    return [int(bytes(row[:3])) for row in batch["input_ids"][real].tolist()]


def iterator(**options: Any) -> BatchIterator:
    return BatchIterator(dataset(), **{"global_batch_size": 4, "seed": 3, **options})


def take(batches: BatchIterator, count: int) -> list[list[int]]:
    return [names(next(batches)) for _ in range(count)]


def flat(lists: list[list[int]]) -> list[int]:
    return [name for each in lists for name in each]


def test_the_order_of_rows_is_pinned() -> None:
    """A run must find its place again under another release of NumPy."""
    assert take(iterator(), 1) == [[2, 6, 9, 3]]


# ramp-up


def test_ramp_up_grows_to_the_full_batch() -> None:
    ramp = BatchRamp.parse("1 2 2")
    assert ramp is not None
    assert [ramp.rows(batch, 4) for batch in range(6)] == [1, 1, 3, 3, 4, 4]


def test_ramp_up_in_units_of_micro_batches() -> None:
    assert BatchRamp.parse(" 1  2 5 ", unit=8) == BatchRamp(8, 16, 5)


def test_no_ramp_up() -> None:
    assert BatchRamp.parse("") is None


def test_small_batches_are_filled_up_with_rows_without_targets() -> None:
    batches = iterator(ramp=BatchRamp(1, 2, 1))
    whole = iterator(global_batch_size=8)
    found = []
    for size in (1, 3, 4):
        batch = next(batches)
        assert {name: len(tensor) for name, tensor in batch.items()} == dict.fromkeys(batch, 4)
        assert batch["labels"][size:].unique().tolist() in ([-100], [])
        assert batches.num_rows == size
        found += names(batch)
    assert found == names(next(whole))


@pytest.mark.parametrize("text", ["4", "1 2", "1 2 3 4", "a b c", "1.5 1 1", "-1 1 1", "0 1 1"])
def test_a_wrong_ramp_up_is_refused(text: str) -> None:
    with pytest.raises(IlmCompileError, match="rampup_batch_size: expected"):
        BatchRamp.parse(text)


def test_a_ramp_up_that_starts_above_the_full_batch_is_refused() -> None:
    with pytest.raises(IlmCompileError, match="global_batch_size=4 rows, got a start of 5"):
        iterator(ramp=BatchRamp(5, 1, 1))


# skipping


def test_skipped_batches_are_passed_over() -> None:
    every = take(iterator(), 9)
    skipping = iterator(skip="0,2-4, 6")
    assert take(skipping, 4) == [every[1], every[5], every[7], every[8]]
    assert skipping.batches_taken == 9


def test_skipped_batches_of_a_ramp_have_its_size() -> None:
    ramp = BatchRamp(1, 1, 1)
    assert take(iterator(ramp=ramp, skip="1"), 2) == take(iterator(ramp=ramp), 3)[::2]


def test_no_batch_is_skipped_by_an_empty_text() -> None:
    assert BatchNumbers.parse("").ranges == ()


@pytest.mark.parametrize("text", ["1-", "-3", "5-2", "x", "1 2", "1--2", "1,,2;"])
def test_wrong_numbers_of_batches_are_refused(text: str) -> None:
    with pytest.raises(IlmCompileError, match="skip_batches: expected numbers and ranges"):
        BatchNumbers.parse(text)


# resuming


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 8])
def test_a_run_with_ramp_up_and_skipping_goes_on_exactly(steps: int) -> None:
    options: dict[str, Any] = {"ramp": BatchRamp(1, 1, 2), "skip": "1,5-6"}
    original = iterator(**options)
    take(original, steps)
    state = json.loads(json.dumps(original.state_dict()))
    resumed = iterator(**options)
    resumed.load_state_dict(state)
    assert take(resumed, 8) == take(original, 8)


def test_a_run_may_go_on_with_other_batches_of_the_same_rows() -> None:
    first = iterator(global_batch_size=3)
    begun = flat(take(first, 3))
    resumed = iterator(global_batch_size=5)
    resumed.load_state_dict(first.state_dict())
    assert begun + flat(take(resumed, 3)) == flat(take(iterator(), 6))


OTHERS = {
    "rows": (lambda: BatchIterator(dataset(11), global_batch_size=4, seed=3), "num_rows"),
    "length": (lambda: BatchIterator(longer(), global_batch_size=4, seed=3), "seq_len"),
    "seed": (lambda: iterator(seed=4), "seed"),
    "content": (
        lambda: BatchIterator(
            pack_documents([f"{row + 1:03d}" for row in range(12)], seq_len=4),
            global_batch_size=4,
            seed=3,
        ),
        "fingerprint",
    ),
}


@pytest.mark.parametrize(("make", "key"), OTHERS.values(), ids=OTHERS)
def test_a_state_of_something_else_is_refused(make: Any, key: str) -> None:
    state = iterator().state_dict()
    with pytest.raises(IlmCompileError, match=f"saved with {key}=.*, this iterator has {key}="):
        make().load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_taken": -1}, "a count of at least 0 as rows_taken, got -1"),
        ({"rows_taken": 1.0}, "as rows_taken, got 1.0"),
        ({"batches_taken": True}, "as batches_taken, got True"),
        ({"extra": 1}, "expected the keys"),
    ],
    ids=str,
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(
    change: dict[str, Any], message: str
) -> None:
    batches = iterator()
    with pytest.raises(IlmCompileError, match=message):
        batches.load_state_dict({**batches.state_dict(), **change})
    assert take(batches, 2) == take(iterator(), 2)


@pytest.mark.parametrize("state", [{}, [], None, {"rows_taken": 0}], ids=str)
def test_anything_else_is_no_state(state: Any) -> None:
    with pytest.raises(IlmCompileError, match="expected the keys"):
        iterator().load_state_dict(state)


# reading ahead


def test_workers_give_the_same_batches_and_go_on_exactly() -> None:
    options: dict[str, Any] = {"ramp": BatchRamp(1, 1, 2), "skip": "1,5-6"}
    expected = take(iterator(**options), 9)
    ahead = iterator(num_workers=2, **options)
    assert take(ahead, 3) == expected[:3]
    state = ahead.state_dict()
    assert take(ahead, 2) == expected[3:5]
    ahead.load_state_dict(state)
    assert take(ahead, 6) == expected[3:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_that_cannot_be_read_is_not_taken(tmp_path: Path, num_workers: int) -> None:
    write_shard(tmp_path / "a.bin", [[1, 2, 30]])
    data = TokenDataset.open(tmp_path, seq_len=3, vocab_size=20)
    batches = BatchIterator(data, global_batch_size=1, num_workers=num_workers)
    for _ in range(2):
        with pytest.raises(IlmCompileError) as error:
            next(batches)
    assert batches.batches_taken == 0
    assert "vocabulary size 20 at offset 0" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(IlmCompileError, match="num_workers of at least 0, got -1"):
        iterator(num_workers=-1)


# validation


def test_validation_sees_every_row_once_in_order() -> None:
    batches = ValidationBatches(dataset(), global_batch_size=5)
    assert len(batches) == 3
    for _ in range(2):
        found = list(batches)
        assert [len(batch["input_ids"]) for batch in found] == [5, 5, 5]
        assert [names(batch) for batch in found] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def test_validation_stops_after_max_batches() -> None:
    batches = ValidationBatches(dataset(), global_batch_size=5, max_batches=2)
    assert [len(names(batch)) for batch in batches] == [5, 5]


def test_validation_leaves_the_data_as_it_is() -> None:
    rows = dataset(1)
    before = rows.labels.clone()
    list(ValidationBatches(rows, global_batch_size=3))
    assert torch.equal(rows.labels, before)


@pytest.mark.parametrize(("size", "most"), [(0, None), (1, 0)])
def test_validation_refuses_bad_numbers(size: int, most: int | None) -> None:
    with pytest.raises(IlmCompileError, match=f"global_batch_size={size}, max_batches={most}"):
        ValidationBatches(dataset(), global_batch_size=size, max_batches=most)
