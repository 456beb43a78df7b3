"""Conversations, one a row, of which only the answers are learnt."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data import (
    IGNORED_LABEL,
    ByteTokenizer,
    Conversations,
    chat_of,
    labels_in_place,
)

LONG = [("user", "?" * 40), ("assistant", "no")]
SHORT = [("user", "hi"), ("assistant", "é!")]


def conversations(folder: Path, *talks: list[tuple[str, str]], **options: Any) -> Conversations:
    lines = [
        json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]})
        for talk in talks
    ]
    (folder / "talks.jsonl").write_text("\n".join(lines))
    given = {"seq_len": 48, "vocab_size": 258, **options}
    tokenizer = ByteTokenizer()
    return Conversations(
        [folder / "talks.jsonl"], tokenizer=tokenizer, chat=chat_of("bytes"), **given
    )


def learnt(batch: dict[str, torch.Tensor], row: int = 0) -> list[int]:
    labels = batch["labels"][row]
    return labels[labels != IGNORED_LABEL].tolist()


def test_the_answer_and_the_end_are_learnt_byte_by_byte(tmp_path: Path) -> None:
    batch = conversations(tmp_path, SHORT).batch(torch.tensor([0]))
    assert learnt(batch) == [*"é!".encode(), ByteTokenizer.end_of_document]
    text = "### User:\nhi\n\n### Assistant:\né!".encode()
    end, filling = ByteTokenizer.end_of_document, ByteTokenizer.padding
    assert batch["input_ids"][0].tolist() == [*text, end, *[filling] * (47 - len(text))]
    first = (batch["labels"][0] != IGNORED_LABEL).nonzero()[0, 0]
    assert batch["input_ids"][0, first + 1] == "é".encode()[0]


def test_labels_in_place_are_the_tokens_themselves(tmp_path: Path) -> None:
    batch = labels_in_place(conversations(tmp_path, SHORT).batch(torch.tensor([0])))
    kept = batch["labels"] != IGNORED_LABEL
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert kept.sum() == 4


def test_a_long_conversation_is_refused_by_its_line_or_cut(tmp_path: Path) -> None:
    longer = [("user", "hi"), ("assistant", "yes " * 20)]
    with pytest.raises(IlmCompileError, match=r"talks.jsonl:2: the conversation has \d+ tokens"):
        conversations(tmp_path, SHORT, longer)
    cut = conversations(tmp_path, SHORT, longer, LONG, too_long="truncate")
    assert (len(cut), cut.num_cut, cut.num_left_out) == (2, 1, 1)
    assert bytes(learnt(cut.batch(torch.tensor([1])))) == b"yes " * 5


def test_nothing_to_learn_and_a_strange_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IlmCompileError, match=r"got none of 1; raise data\.seq_len"):
        conversations(tmp_path, LONG, too_long="truncate")
    with pytest.raises(IlmCompileError, match=r"talks.jsonl:1: the tokenizer gives 256"):
        conversations(tmp_path, SHORT, vocab_size=256)


def test_the_identity_is_that_of_tokens_and_labels(tmp_path: Path) -> None:
    first = conversations(tmp_path, SHORT).identity()
    assert conversations(tmp_path, SHORT).identity() == first
    assert conversations(tmp_path, [("user", "hi"), ("assistant", "e!!")]).identity() != first
