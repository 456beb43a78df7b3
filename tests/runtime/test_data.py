"""Tokens, packing, and the order of batches."""

import itertools
from pathlib import Path

import pytest
import torch

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data import (
    IGNORED_LABEL,
    BatchIterator,
    ByteTokenizer,
    PackedText,
    documents_from_files,
    documents_from_pydoc,
    pack_documents,
)

END, PAD, NONE = ByteTokenizer.end_of_document, ByteTokenizer.padding, IGNORED_LABEL
A, B, C, D, E, F = b"abcdef"


def dataset(num_rows: int) -> PackedText:
    """Rows that can be told apart by their first token."""
    return pack_documents([f"{row:03d}" for row in range(num_rows)], seq_len=4)


def row_names(batch: dict[str, torch.Tensor]) -> list[int]:
    tokenizer = ByteTokenizer()
    return [int(tokenizer.decode(row)) for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize("text", ["plain", "", "gr\u00fc\u00df dich", "\u4e66\u751f"])
def test_byte_tokens_decode_to_the_same_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_leaves_special_tokens_out() -> None:
    assert ByteTokenizer().decode([A, END, B, PAD, PAD]) == "ab"


def test_decode_replaces_broken_utf8() -> None:
    assert ByteTokenizer().decode([A, 0xC3]) == "a\ufffd"


def test_two_documents_share_a_row() -> None:
    packed = pack_documents(["abc", "d"], seq_len=8, max_documents=3)
    assert packed.input_ids.tolist() == [[A, B, C, END, D, END, PAD, PAD]]
    assert packed.labels.tolist() == [[B, C, END, NONE, END, NONE, NONE, NONE]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert packed.cu_seqlens.tolist() == [[0, 4, 8, 8]]


def test_a_document_goes_on_in_the_next_row_and_keeps_its_target() -> None:
    packed = pack_documents(["a", "bcd"], seq_len=4)
    assert packed.input_ids.tolist() == [[A, END, B, C], [D, END, PAD, PAD]]
    assert packed.labels.tolist() == [[END, NONE, C, D], [END, NONE, NONE, NONE]]
    assert packed.position_ids.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert packed.cu_seqlens[0, :3].tolist() == [0, 2, 4]


def test_a_row_with_too_many_documents_is_closed_and_padded() -> None:
    packed = pack_documents(["a", "b", "c"], seq_len=6, max_documents=2)
    assert packed.input_ids.tolist() == [[A, END, B, END, PAD, PAD], [C, END, PAD, PAD, PAD, PAD]]
    assert packed.cu_seqlens.tolist() == [[0, 2, 6], [0, 6, 6]]


@pytest.mark.parametrize("max_documents", [1, 2, 8])
@pytest.mark.parametrize("seq_len", [1, 3, 16, 1000])
def test_no_token_and_no_target_is_lost(seq_len: int, max_documents: int) -> None:
    documents = ["", "abcdef" * 7, "a", "bb", "", "ccc" * 5, "d"]
    packed = pack_documents(documents, seq_len=seq_len, max_documents=max_documents)
    tokens = [token for row in packed.input_ids.tolist() for token in row if token != PAD]
    assert tokens == [t for text in documents for t in [*text.encode(), END]]
    targets = [label for row in packed.labels.tolist() for label in row if label != NONE]
    assert targets == [t for text in documents for t in [*text.encode(), END][1:]]


@pytest.mark.parametrize("max_documents", [1, 2, 8])
def test_cu_seqlens_and_positions_tell_the_same_documents(max_documents: int) -> None:
    packed = pack_documents(["abc", "d", "ef" * 9, "", "f"], seq_len=8, max_documents=max_documents)
    assert packed.cu_seqlens.shape == (len(packed), max_documents + 1)
    for boundaries, positions in zip(packed.cu_seqlens, packed.position_ids, strict=True):
        lengths = boundaries.diff().tolist()
        assert sum(lengths) == 8
        assert positions.tolist() == list(itertools.chain.from_iterable(map(range, lengths)))


def test_packed_dtypes() -> None:
    packed = pack_documents(["abc"], seq_len=4)
    dtypes = [x.dtype for x in (packed.input_ids, packed.labels, packed.position_ids)]
    assert dtypes == [torch.int64] * 3
    assert packed.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize(("seq_len", "max_documents"), [(0, 8), (8, 0)])
def test_packing_refuses_empty_rows(seq_len: int, max_documents: int) -> None:
    with pytest.raises(IlmCompileError, match=rf"seq_len={seq_len}, max_documents={max_documents}"):
        pack_documents(["a"], seq_len=seq_len, max_documents=max_documents)


def test_packing_refuses_no_documents() -> None:
    with pytest.raises(IlmCompileError, match="expected at least one document, got none"):
        pack_documents([], seq_len=8)


def test_a_batch_holds_the_forward_arguments() -> None:
    batch = next(BatchIterator(dataset(5), global_batch_size=3))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (3, 4),
        "labels": (3, 4),
        "position_ids": (3, 4),
        "cu_seqlens": (3, 9),
    }


def test_every_row_comes_once_per_epoch_when_the_batch_does_not_divide_it() -> None:
    batches = BatchIterator(dataset(5), global_batch_size=2)
    names = [name for _ in range(5) for name in row_names(next(batches))]
    assert sorted(names[:5]) == sorted(names[5:]) == [0, 1, 2, 3, 4]
    assert batches.epoch == 2


def test_epochs_differ_and_repeat_with_the_seed() -> None:
    def two_epochs(seed: int) -> list[list[int]]:
        batches = BatchIterator(dataset(20), global_batch_size=20, seed=seed)
        return [row_names(next(batches)), row_names(next(batches))]

    first, second = two_epochs(7)
    assert first != second
    assert two_epochs(7) == [first, second]
    assert two_epochs(8)[0] != first


@pytest.mark.parametrize("steps", [0, 1, 3, 5, 7])
def test_a_resumed_iterator_gives_the_next_batch(steps: int) -> None:
    original = BatchIterator(dataset(6), global_batch_size=2, seed=3)
    for _ in range(steps):
        next(original)
    resumed = BatchIterator(dataset(6), global_batch_size=2, seed=3)
    resumed.load_state_dict(original.state_dict())
    for _ in range(4):
        assert row_names(next(resumed)) == row_names(next(original))


def test_a_run_may_resume_with_another_batch_size() -> None:
    whole = BatchIterator(dataset(12), global_batch_size=12, seed=3)
    first = BatchIterator(dataset(12), global_batch_size=4, seed=3)
    names = row_names(next(first))
    resumed = BatchIterator(dataset(12), global_batch_size=8, seed=3)
    resumed.load_state_dict(first.state_dict())
    assert names + row_names(next(resumed)) == row_names(next(whole))


@pytest.mark.parametrize(
    ("num_rows", "seed", "message"),
    [(5, 1, "saved with num_rows=6, this iterator has num_rows=5"), (6, 2, "saved with seed=1")],
    ids=["other-data", "other-seed"],
)
def test_resuming_refuses_another_order(num_rows: int, seed: int, message: str) -> None:
    state = BatchIterator(dataset(6), global_batch_size=2, seed=1).state_dict()
    with pytest.raises(IlmCompileError, match=message):
        BatchIterator(dataset(num_rows), global_batch_size=2, seed=seed).load_state_dict(state)


@pytest.mark.parametrize(("batch", "seed"), [(0, 0), (1, -1)])
def test_iterator_refuses_bad_numbers(batch: int, seed: int) -> None:
    with pytest.raises(IlmCompileError, match=f"got global_batch_size={batch}, seed={seed}"):
        BatchIterator(dataset(2), global_batch_size=batch, seed=seed)


def test_pydoc_topics_are_a_few_hundred_kilobytes_of_text() -> None:
    documents = documents_from_pydoc()
    assert len(documents) > 50
    assert sum(map(len, documents)) > 300_000


def test_files_are_read_in_the_given_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text(f"text of {name} \u00fc", encoding="utf-8")
    texts = documents_from_files([tmp_path / "b", str(tmp_path / "a")])
    assert texts == ["text of b \u00fc", "text of a \u00fc"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IlmCompileError, match=r"text file at .*missing\.txt: No such file"):
        documents_from_files([tmp_path / "missing.txt"])


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"gr\xfc\xdf")
    with pytest.raises(IlmCompileError, match=r"latin1\.txt, got byte 0xfc at offset 2"):
        documents_from_files([tmp_path / "latin1.txt"])
