"""Ranks open the summary of a folder and the files that their rows lie in, and no others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data import ByteTokenizer, TokenDataset, open_shards, shard, write_shard
from ilm_compile.runtime.data.prepare import prepare
from ilm_compile.runtime.data.shard_summary import NAME
from ilm_compile.runtime.data.text_files import Document

TEXTS = ["abc", "defg", "hi", "jklmn", "op", "qrstu"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six files of a document each, and their summary."""
    documents = [Document(text, len(text), "texts") for text in TEXTS]
    prepare(documents, tmp_path / "data", tokenizer=ByteTokenizer(), shard_tokens=1)
    return tmp_path / "data"


@pytest.fixture
def by_hand(folder: Path) -> Path:
    """The same without a summary, as other tools leave it, written a minute ago."""
    (folder / NAME).unlink()
    for path in folder.iterdir():
        os.utime(path, ns=(0, path.stat().st_mtime_ns - 60 * 10**9))
    return folder


def be(patch: pytest.MonkeyPatch, rank: int, size: int = 2) -> None:
    patch.setenv("RANK", str(rank))
    patch.setenv("WORLD_SIZE", str(size))


def open_data(folder: Path) -> TokenDataset:
    return TokenDataset.open(folder, seq_len=4, vocab_size=300)


def rows(data: TokenDataset, *numbers: int) -> dict[str, torch.Tensor]:
    return data.batch(torch.tensor(numbers))


class Opened(list[str]):
    """The names of the files whose index was read meanwhile."""

    def __enter__(self) -> Opened:
        read = shard.read_index

        def noting(path: Path, num_bytes: int) -> object:
            self.append(path.name)
            return read(path, num_bytes)

        self._patch = mock.patch.object(shard, "read_index", noting)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_files_of_a_row_are_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    be(monkeypatch, rank)
    with Opened() as opened:
        data = open_data(folder)
        data.outline()
        data.identity()
        assert opened == []
        rows(data, 0)
        assert 1 <= len(opened) <= 2
        rows(data, *range(len(data)))
    assert sorted(opened) == sorted(path.name for path in folder.glob("*.bin"))


def test_a_summary_changes_no_row_and_no_fingerprint(folder: Path) -> None:
    data = open_data(folder)
    (folder / NAME).unlink()
    without = open_data(folder)
    assert (data.identity(), data.outline()) == (without.identity(), without.outline())
    every = range(len(data))
    for name, value in rows(data, *every).items():
        assert torch.equal(value, rows(without, *every)[name])


def test_rank_0_of_several_writes_it(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, size in ((0, 1), (1, 2)):
        be(monkeypatch, rank, size)
        open_shards(by_hand)
        assert not (by_hand / NAME).exists()
    be(monkeypatch, 0)
    expected = open_data(by_hand).identity()
    assert (by_hand / NAME).exists()
    with Opened() as opened:
        assert open_data(by_hand).identity() == expected
    assert opened == []


def test_a_file_that_may_be_changing_is_not_written_down(
    by_hand: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be(monkeypatch, 0)
    (by_hand / "00003.bin").touch()
    open_shards(by_hand)
    assert not (by_hand / NAME).exists()


def test_a_folder_that_cannot_be_written_to_is_read(
    by_hand: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be(monkeypatch, 0)
    (by_hand / NAME).mkdir()
    files = sorted(by_hand.iterdir())
    assert len(open_shards(by_hand)) == len(TEXTS)
    assert sorted(by_hand.iterdir()) == files


def overwrite(folder: Path, document: list[int]) -> None:
    for path in ("00002.bin", "00002.bin.meta"):
        (folder / path).unlink()
    write_shard(folder / "00002.bin", [document])


CHANGES = {"another size": [1, 2, 3, 4, 5, 6, 7], "another length": [10411, 111256]}


@pytest.mark.parametrize("document", CHANGES.values(), ids=CHANGES)
def test_rank_0_sees_that_a_file_was_overwritten(folder: Path, document: list[int]) -> None:
    overwrite(folder, document)
    data = open_data(folder)
    (folder / NAME).unlink()
    assert data.outline() == open_data(folder).outline()


@pytest.mark.parametrize("document", CHANGES.values(), ids=CHANGES)
def test_other_ranks_refuse_to_read_a_file_that_was_overwritten(
    folder: Path, monkeypatch: pytest.MonkeyPatch, document: list[int]
) -> None:
    overwrite(folder, document)
    be(monkeypatch, 1)
    data = open_data(folder)
    with pytest.raises(IlmCompileError, match=rf"00002\.bin, as the summary .* remove {NAME}"):
        rows(data, *range(len(data)))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_more_or_less_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    be(monkeypatch, rank)
    write_shard(folder / "00009.bin", [[1, 2]])
    assert len(open_shards(folder)) == len(TEXTS) + 1
    (folder / "00009.bin").unlink()
    (folder / "00001.bin").unlink()
    assert len(open_shards(folder)) == len(TEXTS) - 1


def test_an_index_that_is_gone_is_named(folder: Path) -> None:
    (folder / "00004.bin.meta").unlink()
    with pytest.raises(IlmCompileError, match=r"index of .*00004\.bin at .*found none"):
        open_shards(folder)


def other_version(path: Path) -> None:
    save_file(load_file(path), path, {"version": "0"})


def longer(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-8] += 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "another length": longer,
    "another version": other_version,
    "no summary": lambda path: save_file({"lengths": np.zeros(6, np.int64)}, path),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_summary_is_not_believed(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    rank: int,
) -> None:
    expected = open_data(folder).outline()
    damage(folder / NAME)
    be(monkeypatch, rank)
    assert open_data(folder).outline() == expected
