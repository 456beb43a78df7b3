"""Token files: what is written is read, and what is damaged is refused by name and offset."""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data import ShardWriter, TokenShard, open_shards, write_shard
from ilm_compile.runtime.data.shard_folder import type_ids

DOCUMENTS = [[1, 2, 3], [], [-4, 5], [19]]
VOCAB = 20


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "en" / "a.bin"
    write_shard(path, DOCUMENTS)
    return path


def read(path: Path, vocab_size: int = VOCAB) -> list[list[int]]:
    shard = TokenShard(path)
    return [shard.tokens(i, vocab_size=vocab_size).tolist() for i in range(len(shard))]


def write_by_hand(path: Path, lines: list[str], lengths: list[int], dtype: str = "int32") -> None:
    """As InternLM's tools do: two columns, no checksums."""
    data = [line.encode() for line in lines]
    path.write_bytes(b"".join(data))
    offsets = np.cumsum([0, *map(len, data)])[:-1]
    with Path(f"{path}.meta").open("wb") as file:
        np.save(file, np.array(list(zip(offsets, lengths, strict=True)), dtype=dtype))


def test_documents_are_read_as_they_were_written(shard: Path) -> None:
    assert read(shard) == DOCUMENTS
    assert TokenShard(shard).lengths.tolist() == [3, 0, 2, 1]


def test_the_layout_is_internlms(shard: Path) -> None:
    """A reader like InternLM's, which takes the first and the last column of the index."""
    index = np.load(f"{shard}.meta", allow_pickle=False)
    data = shard.read_bytes()
    for document, (offset, length) in enumerate(zip(index[:, 0], index[:, -1], strict=True)):
        tokens = json.loads(data[offset:].split(b"\n")[0])["tokens"]
        assert (tokens, len(tokens)) == (DOCUMENTS[document], length)


def test_files_of_internlms_tools_are_read(tmp_path: Path) -> None:
    lines = ['{"tokens": [1, 2, 3]}\n', '{"tokens": [-4, 5], "source": "web"}\n']
    write_by_hand(tmp_path / "a.bin", lines, [3, 2])
    assert read(tmp_path / "a.bin") == [[1, 2, 3], [-4, 5]]


def test_types_are_the_sub_folders(tmp_path: Path) -> None:
    for name in ("en/x/a.bin", "cn/b.bin", "c.bin", ".hidden/d.bin"):
        write_shard(tmp_path / name, DOCUMENTS)
    shards = open_shards(tmp_path)
    found = {shard.path.name: shard.type_name for shard in shards}
    assert found == {"a.bin": "en", "b.bin": "cn", "c.bin": "text"}
    assert type_ids(shards) == {"cn": 0, "en": 1, "text": 2}


def test_a_folder_without_token_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IlmCompileError, match=r"expected \*\.bin files below"):
        open_shards(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IlmCompileError, match=r"expected a folder at .*absent, found none"):
        open_shards(tmp_path / "absent")


# writing


def test_nothing_is_overwritten(shard: Path) -> None:
    before = shard.read_bytes()
    with pytest.raises(IlmCompileError, match=r"a\.bin exists"):
        write_shard(shard, [[7]])
    assert shard.read_bytes() == before


def test_an_error_while_writing_leaves_no_file(tmp_path: Path) -> None:
    def stop_in_between() -> None:
        with ShardWriter(tmp_path / "a.bin") as writer:
            writer.add([1, 2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_in_between()
    assert list(tmp_path.iterdir()) == []


def test_files_have_their_names_only_when_complete(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.bin") as writer:
        writer.add([1, 2])
        assert not (tmp_path / "a.bin").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.bin.meta"]


# damage

Damage = Callable[[Path], object]


def rewrite_index(change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    def damage(path: Path) -> None:
        index = np.load(f"{path}.meta")
        with Path(f"{path}.meta").open("wb") as file:
            np.save(file, change(index), allow_pickle=True)

    return damage


def change_cell(row: int, column: int, value: int) -> Damage:
    def change(index: np.ndarray) -> np.ndarray:
        index[row, column] = value
        return index

    return rewrite_index(change)


class Payload:
    """Writes a file if it is ever unpickled."""

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path("executed"),)


def write_meta(data: bytes) -> Damage:
    return lambda path: Path(f"{path}.meta").write_bytes(data)


def truncate(size: int, suffix: str = "") -> Damage:
    def damage(path: Path) -> None:
        file = Path(f"{path}{suffix}")
        file.write_bytes(file.read_bytes()[:size])

    return damage


def test_the_payload_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "executed").exists()


AT_OPENING: dict[str, tuple[Damage, str]] = {
    "no index": (lambda p: Path(f"{p}.meta").unlink(), r"index of .*a\.bin at .*a\.bin\.meta"),
    "no file": (lambda p: p.unlink(), r"readable file at .*a\.bin: No such file"),
    "truncated": (truncate(22), r"document 1 should start at offset 22 of .*a\.bin, which has 22"),
    "cut in a line": (truncate(70), r"the end of a line at offset 69 of .*a\.bin, got '1'"),
    "empty": (truncate(0), r"document 0 should start at offset 0 of .*a\.bin, which has 0 bytes"),
    "index truncated": (truncate(150, ".meta"), r"cannot read .*a\.bin\.meta as a NumPy array"),
    "index empty": (truncate(0, ".meta"), r"cannot read .*a\.bin\.meta"),
    "index too long": (
        lambda p: Path(f"{p}.meta").write_bytes(Path(f"{p}.meta").read_bytes() + b"x"),
        r"a\.bin\.meta to end at offset 224, it has 225 bytes",
    ),
    "index of text": (write_meta(b"offset, length\n"), r"cannot read .*a\.bin\.meta"),
    "index of floats": (rewrite_index(lambda x: x.astype(float)), "expected integers of shape"),
    "index of one column": (rewrite_index(lambda x: x[:, :1]), r"got int64 of shape \(4, 1\)"),
    "index of no document": (rewrite_index(lambda x: x[:0]), r"a\.bin\.meta lists no document"),
    "index pickled": (write_meta(pickle.dumps(Payload())), r"cannot read .*a\.bin\.meta"),
    "index of objects": (
        rewrite_index(lambda x: np.array([Payload()], dtype=object)),
        r"cannot read .*a\.bin\.meta",
    ),
    "first offset": (change_cell(0, 0, 1), r"an offset of 0 in .*a\.bin\.meta, got 1 in row 0"),
    "offset back": (change_cell(2, 0, 5), r"offsets that grow in .*, got 5 in row 2"),
    "offset beyond": (change_cell(3, 0, 10**12), r"document 3 should start at offset 10{12}"),
    "length below 0": (change_cell(1, -1, -1), r"lengths of at least 0 in .*, got -1 in row 1"),
    "length too long": (change_cell(1, -1, 9), r"fit in a\.bin in .*meta, got 9 in row 1"),
    "length huge": (change_cell(1, -1, 2**62), r"fit in a\.bin in .*meta, got 4611686018427387904"),
}


@pytest.mark.parametrize(("damage", "message"), AT_OPENING.values(), ids=AT_OPENING)
def test_damage_is_noticed_when_a_file_is_opened(
    shard: Path, damage: Damage, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shard.parent)
    damage(shard)
    with pytest.raises(IlmCompileError, match=message):
        TokenShard(shard)
    assert not (shard.parent / "executed").exists()


def test_a_file_above_2_gib_with_32_bit_offsets_is_refused(shard: Path) -> None:
    change_cell(3, 0, np.int64(2**31).astype(np.int32).item())(shard)
    with pytest.raises(IlmCompileError, match="InternLM's own tool writes 32-bit numbers"):
        TokenShard(shard)


def replace(old: bytes, new: bytes) -> Damage:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))

    return damage


AT_READING: dict[str, tuple[Damage, int, str]] = {
    "a digit": (replace(b"[-4, 5]", b"[-4, 6]"), 2, r"at offset 37 of .*a\.bin \(document 2\)"),
    "a length": (change_cell(2, -1, 1), 2, r"1 tokens at offset 37 .*, got 2"),
    "a checksum": (change_cell(0, 1, 5), 0, r"the checksum 0x5 at offset 0"),
}


@pytest.mark.parametrize(("damage", "document", "message"), AT_READING.values(), ids=AT_READING)
def test_damage_is_noticed_when_a_document_is_read(
    shard: Path, damage: Damage, document: int, message: str
) -> None:
    damage(shard)
    opened = TokenShard(shard)
    with pytest.raises(IlmCompileError, match=message):
        opened.tokens(document, vocab_size=VOCAB)


LINES = {
    "no JSON": ('{"tokens": [1, 2\n', "got Expecting"),
    "not UTF-8 escaped": ('{"tokens": [1, \\u00002]}\n', "got Expecting"),
    "a list": ("[1, 2, 34, 56, 78, 90]\n", r"got \[1, 2"),
    "no tokens": ('{"text": [1, 2, 3, 4]}\n', "got "),
    "a text": ('{"tokens": "12 34 56"}\n', "got "),
    "a float": ('{"tokens": [1, 2.0]}\n', "got "),
    "a truth": ('{"tokens": [1, true]}\n', "got "),
    "a list inside": ('{"tokens": [1, [2]]}\n', "got "),
    "nested": ("[" * 100_000 + "\n", "nested too deeply"),
    "too many": ('{"tokens": [1, 2, 3]}\n', "expected 2 tokens at offset 0 .*, got 3"),
    "beyond the vocabulary": (
        '{"tokens": [1, 20]}\n',
        "below the vocabulary size 20 .*20 as token 1",
    ),
    "masked beyond": ('{"tokens": [1, -20]}\n', "got -20 as token 1"),
    "beyond 64 bits": ('{"tokens": [1, 99999999999999999999]}\n', "got 99999999999999999999 as"),
    "two lines": ('{"tokens": [1, 2]}\n{"tokens": [3]}\n', "one line at offset 0 .*, got several"),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=LINES)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    write_by_hand(tmp_path / "a.bin", [line], [2])
    shard = TokenShard(tmp_path / "a.bin")
    with pytest.raises(IlmCompileError, match=message) as error:
        shard.tokens(0, vocab_size=VOCAB)
    assert str(tmp_path / "a.bin") in str(error.value)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a.bin", ['{"tokens": [1, 2]}\n'], [2])
    replace(b"1", b"\xff")(tmp_path / "a.bin")
    with pytest.raises(IlmCompileError, match=r"at offset 0 of .*a\.bin .*codec can't decode"):
        read(tmp_path / "a.bin")


def test_a_file_truncated_while_it_is_read_is_named(shard: Path) -> None:
    opened = TokenShard(shard)
    opened.tokens(0, vocab_size=VOCAB)
    with shard.open("r+b") as file:
        file.truncate(10)
    with pytest.raises(
        IlmCompileError, match=r"a\.bin had \d+ bytes when it was opened and has 10"
    ):
        opened.tokens(3, vocab_size=VOCAB)


def test_a_closed_shard_opens_again(shard: Path) -> None:
    opened = TokenShard(shard)
    opened.tokens(0, vocab_size=VOCAB)
    opened.close()
    assert not opened.is_open
    assert opened.tokens(2, vocab_size=VOCAB).tolist() == [-4, 5]


def test_the_checksum_is_the_crc32_of_the_line(shard: Path) -> None:
    index = np.load(f"{shard}.meta")
    lines = shard.read_bytes().splitlines(keepends=True)
    assert index[:, 1].tolist() == [zlib.crc32(line) for line in lines]
