"""Thousands of damaged token files: each is read right, or refused by name. Nothing else happens.

What a file means is decided here a second time, in the plainest way: an index in two or three
columns that leads from line to line, and lines of JSON.
"""

from __future__ import annotations

import io
import json
import zlib
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data import TokenDataset, TokenShard, write_shard
from ilm_compile.runtime.data.text_files import read_documents

VOCAB = 300
DOCUMENTS = [[1, 2, 3], [-4, 5, 256], [], [299] * 9, [7]]
QUICK = settings(
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# A change: of a byte, of a stretch, or the end.
places = st.floats(0, 1, exclude_max=True)
change = st.tuples(
    places,
    st.one_of(
        st.integers(0, 7).map(lambda bit: ("flip", bit)),
        st.binary(max_size=12).map(lambda data: ("write", data)),
        st.binary(max_size=12).map(lambda data: ("insert", data)),
        st.integers(1, 40).map(lambda size: ("delete", size)),
        st.just(("cut", 0)),
        st.sampled_from([b"\n", b"]", b"[", b",", b"-", b"9", b"}", b"\x80", b"true", b"1e3"]).map(
            lambda data: ("write", data)
        ),
    ),
)


def damaged(data: bytes, place: float, kind: str, what: Any) -> bytes:
    at = int(place * len(data))
    before, after = data[:at], data[at:]
    return {
        "flip": lambda: before + bytes([after[0] ^ 1 << what]) + after[1:] if after else data,
        "write": lambda: before + what + after[len(what) :],
        "insert": lambda: before + what + after,
        "delete": lambda: before + after[what:],
        "cut": lambda: before,
    }[kind]()


def meaning(data: bytes, index: bytes) -> list[list[int]] | None:
    """The documents of a file and its index; None if they are not a whole one."""
    try:
        file = io.BytesIO(index)
        table = np.lib.format.read_array(file, allow_pickle=False)
        rows = [[int(cell) for cell in row] for row in table]
        ends = [*(row[0] for row in rows[1:]), len(data)]
        documents: list[list[int]] = []
        position = 0
        if file.read() or table.dtype.kind not in "iu":
            return None
        for row, end in zip(rows, ends, strict=True):
            line = data[position:end]
            if row[0] != position or len(row) not in (2, 3) or line.index(b"\n") != len(line) - 1:
                return None
            if len(row) == 3 and row[1] != zlib.crc32(line):
                return None
            tokens = json.loads(line.decode())["tokens"]
            right = type(tokens) is list and all(
                type(token) is int and abs(token) < VOCAB for token in tokens
            )
            if not right or len(tokens) != row[-1]:
                return None
            documents.append(tokens)
            position = end
    except Exception:  # whatever NumPy and JSON raise for what they cannot read
        return None
    return documents


@pytest.fixture
def originals(tmp_path: Path) -> dict[str, tuple[bytes, bytes]]:
    """File and index, with checksums and without, as InternLM's tools write them."""
    write_shard(tmp_path / "ours.bin", DOCUMENTS)
    data, index = ((tmp_path / f"ours.bin{s}").read_bytes() for s in ("", ".meta"))
    without = io.BytesIO()
    np.save(without, np.load(tmp_path / "ours.bin.meta")[:, [0, 2]].astype(np.int32))
    return {"ours": (data, index), "theirs": (data, without.getvalue())}


numbers = count()
SHIFTS = 8  # the same changes at so many places: drawing them is what takes the time


@pytest.mark.filterwarnings("ignore:Reading .*Python 2")  # NumPy, of some damaged headers
@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_a_damaged_token_file_is_read_right_or_refused(
    tmp_path: Path, originals: dict[str, tuple[bytes, bytes]], kind: str
) -> None:
    seen = {"read": 0, "refused": 0}

    def check_one(data: bytes, index: bytes) -> None:
        path = tmp_path / f"{next(numbers)}.bin"
        path.write_bytes(data)
        Path(f"{path}.meta").write_bytes(index)
        expected, message = meaning(data, index), ""
        try:
            shard = TokenShard(path)
            found: Any = [shard.tokens(i, vocab_size=VOCAB).tolist() for i in range(len(shard))]
            shard.close()
        except IlmCompileError as error:
            found, message = None, str(error)
        finally:
            path.unlink()
            Path(f"{path}.meta").unlink()
        assert found == expected
        if found is None:
            assert path.name in message
            assert "\n" not in message
        seen["refused" if found is None else "read"] += 1

    @QUICK
    @example([(0.0, ("write", b" "))], "data")  # in the place of an end of a line, among others
    @given(st.lists(change, min_size=1, max_size=3), st.sampled_from(["data", "index", "both"]))
    def check(changes: list[tuple[float, tuple[str, Any]]], target: str) -> None:
        for shift in range(SHIFTS):
            data, index = originals[kind]
            for place, (name, what) in changes:
                moved = (place + shift / SHIFTS) % 1
                if target != "index":
                    data = damaged(data, moved, name, what)
                if target != "data":
                    index = damaged(index, moved, name, what)
            check_one(data, index)

    check()
    assert sum(seen.values()) > 2000
    assert seen["refused"] > 1000
    assert seen["read"] > 0  # a change that says the same, or in files without checksums a digit


@settings(QUICK, max_examples=60)
@given(st.lists(st.lists(st.integers(1 - VOCAB, VOCAB - 1), max_size=30), min_size=1, max_size=12))
def test_any_documents_are_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any-{next(numbers)}.bin"
    write_shard(path, documents)
    shard = TokenShard(path)
    assert [shard.tokens(i, vocab_size=VOCAB).tolist() for i in range(len(shard))] == documents
    shard.close()
    if any(documents):
        packed = TokenDataset([shard], seq_len=7, vocab_size=VOCAB)
        assert packed.num_tokens == sum(map(len, documents))


@settings(QUICK, max_examples=300)
@given(st.lists(st.one_of(st.binary(max_size=30), st.just(b'{"text": "a"}')), max_size=5))
def test_any_json_lines_are_read_or_refused_by_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        texts = [document.text for document in read_documents([path])]
        message = None
    except IlmCompileError as error:
        message = str(error)
    if message is None:
        written = path.read_bytes().split(b"\n")
        assert texts == [json.loads(line)["text"] for line in written if line.strip()]
    else:
        assert f"{path}:" in message
