"""Batches of the proof: every corner in the first, ever fewer in the further levels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.proof import zoo
from ilm_compile.proof.inputs import LEVELS, corner_batch, microbatch, roles
from tests.proof.small import make_model

TOKENS = 16
SHAPE = ((2, TOKENS), torch.int64)
COUNT = 4
NAMES = ("input_ids", "labels", "position_ids", "attention_mask")


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(make_model("hf-llama"), example_inputs=dict.fromkeys(NAMES, SHAPE))


CORNERS: dict[str, Callable[[dict[str, Tensor]], bool]] = {
    "ids reach both ends": lambda b: bool(
        (b["input_ids"].min() == 0) & (b["input_ids"].max() == zoo.VOCAB - 1)
    ),
    "the last column is ignored": lambda b: bool((b["labels"][:, -1] == -100).any()),
    "the last column is counted": lambda b: bool((b["labels"][:, -1] >= 0).any()),
    "a whole row is ignored": lambda b: bool((b["labels"] == -100).all(1).any()),
    "positions begin anew": lambda b: bool((b["position_ids"][:, 1:] == 0).any()),
    "tokens inside a row are hidden": lambda b: bool(
        ((b["attention_mask"][:, 1:-1] == 0) & (b["attention_mask"][:, 2:] == 1)).any()
    ),
    "the end of a row is hidden": lambda b: bool((b["attention_mask"][:, -1] == 0).any()),
}
FIRST_TO_LACK = {  # the level of `LEVELS` from which a corner is left out
    "a whole row is ignored": 1,
    "the last column is ignored": 2,
    "positions begin anew": 3,
    "tokens inside a row are hidden": 3,
    "the end of a row is hidden": 3,
}


@pytest.mark.parametrize("level", range(len(LEVELS)))
@pytest.mark.parametrize("corner", CORNERS)
def test_each_level_reaches_its_corners(program: Program, corner: str, level: int) -> None:
    batch = corner_batch(program, COUNT, level=level)
    is_there = level < FIRST_TO_LACK.get(corner, len(LEVELS))
    assert CORNERS[corner](batch) == is_there


def test_a_mask_never_hides_the_first_token(program: Program) -> None:
    assert bool((corner_batch(program, 16)["attention_mask"][:, 0] == 1).all())


def test_ids_and_labels_have_roles_and_positions_none(program: Program) -> None:
    found = roles(program)
    assert set(found) == {"input_ids", "labels"}
    assert found["labels"].high == zoo.VOCAB
    assert found["labels"].ignored == -100
    assert found["input_ids"].ignored is None


def test_documents_end_elsewhere_in_each_row() -> None:
    example = {"input_ids": SHAPE, "labels": SHAPE, "cu_seqlens": ((2, 5), torch.int32)}
    documents = corner_batch(trace(make_model("internlm2"), example_inputs=example), 1)[
        "cu_seqlens"
    ]
    assert documents[:, 0].tolist() == [0, 0]
    assert documents[:, -1].tolist() == [TOKENS, TOKENS]
    assert documents[0].tolist() != documents[1].tolist()
    assert bool((documents.diff() >= 0).all())


def test_micro_batches_are_rows_in_order(program: Program) -> None:
    batch = corner_batch(program, COUNT)
    parts = [microbatch(program, batch, index)["input_ids"] for index in range(COUNT)]
    assert torch.equal(torch.cat(parts), batch["input_ids"])
