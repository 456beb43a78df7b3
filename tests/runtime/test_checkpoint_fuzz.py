"""Hostile checkpoints: every reader gives the right values or one clear error, and stays inside.

What is read is watched through Python's audit events: no file outside the checkpoint's folder is
opened, and nothing is executed or unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ilm_compile.runtime.checkpoint.boxes import whole
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import Manifest
from ilm_compile.runtime.checkpoint.parts import contents
from ilm_compile.runtime.checkpoint.slices import SliceReader, check_file, read_manifest
from ilm_compile.runtime.checkpoint.storage import LocalStorage
from ilm_compile.runtime.checkpoint.tensor_file import read_box, read_header, write_tensor_file
from tests.support.checkpoint_job import Job

FUZZ = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TENSORS = "rank-00000-000.safetensors"
PART = "part-00000.json"
FORBIDDEN = {"exec", "compile", "pickle.find_class", "os.system", "subprocess.Popen"}

_watched: list[tuple[str, Any]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and (event == "open" or event in FORBIDDEN):
        _watched.append((event, arguments[0] if arguments else None))


sys.addaudithook(_audit)


@contextmanager
def only_inside(folder: Path) -> Iterator[None]:
    """Fail if the block opens a file outside `folder`, or runs code."""
    global _watched
    _watched = events = []
    try:
        yield
    finally:
        _watched = None
    outside = [
        (event, what)
        for event, what in events  # a number is a file that is open already
        if event != "open" or not (isinstance(what, int) or str(what).startswith(f"{folder}/"))
    ]
    assert not outside


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("good")
    job = Job(folder)
    job.step()
    job.manager.save(1, wait=True)
    job.manager.close()
    return folder


class Tensors(dict[str, Tensor]):
    """Tensors by name and the manifest, in few words: Hypothesis prints a failure's arguments."""

    manifest: Manifest

    def __repr__(self) -> str:
        return f"{len(self)} tensors"


@pytest.fixture(scope="module")
def truth(good: Path) -> Tensors:
    return read_all(good)


def read_all(folder: Path) -> Tensors:
    """Every tensor of the checkpoint of step 1, as a resume reads it."""
    storage, name = LocalStorage(folder), "step-00000001"
    manifest = read_manifest(storage, name)
    for part in contents(storage, name, manifest):
        for file, expected in part.files.items():
            check_file(storage, name, file, expected)
    with SliceReader(storage, name, manifest) as reader:
        found = Tensors((tensor, reader.read(tensor)) for tensor in manifest.tensors)
    found.manifest = manifest
    return found


def read_or_refuse(folder: Path) -> Tensors | None:
    """What is in `folder`, None if it is refused naming a file in it."""
    refusal = ""
    with only_inside(folder):
        try:
            return read_all(folder)
        except CheckpointError as error:
            refusal = str(error)
    assert str(folder / "step-00000001") in refusal
    return None


def check_read(folder: Path, truth: Tensors) -> None:
    """What is in `folder` reads as the truth, or is refused naming a file in it."""
    values = read_or_refuse(folder)
    if values is None:
        return
    assert values.manifest == truth.manifest
    assert values.keys() == truth.keys()
    assert all(torch.equal(values[name], truth[name]) for name in truth)


def put(folder: Path, good: Path, file: str, data: bytes) -> None:
    """A copy of the good checkpoint with one other file."""
    target = folder / "step-00000001"
    target.mkdir(exist_ok=True)
    for source in (good / "step-00000001").iterdir():
        (target / source.name).write_bytes(data if source.name == file else source.read_bytes())


@FUZZ
@given(data=st.data(), file=st.sampled_from(["manifest.json", PART, TENSORS]))
def test_changed_bytes(
    tmp_path: Path, good: Path, truth: Tensors, data: st.DataObject, file: str
) -> None:
    original = bytearray((good / "step-00000001" / file).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # Half of the time near the beginning, where the headers are.
        limit = data.draw(st.sampled_from([64, len(original)]))
        place = data.draw(st.integers(0, min(limit, len(original)) - 1))
        original[place] ^= 1 << data.draw(st.integers(0, 7))
    put(tmp_path, good, file, bytes(original))
    check_read(tmp_path, truth)


@FUZZ
@given(data=st.data(), file=st.sampled_from(["manifest.json", PART, TENSORS]))
def test_cut_and_stretched_files(
    tmp_path: Path, good: Path, truth: Tensors, data: st.DataObject, file: str
) -> None:
    original = (good / "step-00000001" / file).read_bytes()
    length = data.draw(st.integers(0, len(original)))
    tail = data.draw(st.binary(max_size=20))
    put(tmp_path, good, file, original[:length] + tail)
    check_read(tmp_path, truth)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        TENSORS,
        "../secret",
        "/etc/passwd",
        "..",
        "manifest.json",
        "~",
        "a/../../b",
        "",
        "\0",
        "x" * 999,
    ]
) | st.text(max_size=20)
SIZES = st.lists(st.integers(-2, 2**70) | st.integers(0, 20), max_size=4)


def paths_of(value: Any, depth: int = 6) -> list[list[Any]]:
    """The way to every place in a JSON value, down to `depth`."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    if not depth:
        return []
    return [[key, *rest] for key in keys for rest in [[], *paths_of(value[key], depth - 1)]]


@FUZZ
@given(data=st.data(), file=st.sampled_from(["manifest.json", PART]))
def test_a_manifest_with_another_value_somewhere(
    tmp_path: Path, good: Path, truth: Tensors, data: st.DataObject, file: str
) -> None:
    """With the hash made right again: an attacker can do that, and the readers must still hold."""
    body = json.loads((good / "step-00000001" / file).read_text())["body"]
    key = data.draw(st.sampled_from(["tensors", "files" if file == PART else "writers", ""]))
    paths = paths_of({key: body[key]}) if key else [[k] for k in body]
    *way, last = data.draw(st.sampled_from(paths))
    holder = body
    for step in way:
        holder = holder[step]
    if isinstance(holder, dict) and data.draw(st.booleans()):
        holder[data.draw(NAMES)] = holder.pop(last)
    else:
        holder[last] = data.draw(NAMES | SIZES | JSON)
    put(tmp_path, good, file, signed(body))
    values = read_or_refuse(tmp_path)
    for name, value in (values or {}).items():
        assert tuple(value.shape) == tuple(body["tensors"][name]["shape"])


def signed(body: Any) -> bytes:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}).encode()


@FUZZ
@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_a_manifest(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^the-file: "):
        Manifest.from_bytes(data, "the-file")


HEADERS = st.dictionaries(
    st.text(max_size=5),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "I8", "BF16", "X"]),
            "shape": SIZES,
            "data_offsets": st.lists(st.integers(0, 30), min_size=2, max_size=2) | SIZES,
        }
    )
    | JSON,
    max_size=3,
)


@FUZZ
@given(
    header=HEADERS.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=50),
    length=st.none() | st.integers(0, 2**64 - 1),
    body=st.binary(max_size=40),
)
def test_any_header(header: bytes, length: int | None, body: bytes) -> None:
    size = len(header) if length is None else length
    data = size.to_bytes(8, "little") + header + body
    refusal = "the-file: "
    try:
        entries = read_header(io.BytesIO(data), len(data), "the-file")
    except CheckpointError as error:
        entries, refusal = {}, str(error)
    assert refusal.startswith("the-file: ")
    if refusal != "the-file: ":
        return
    values = {n: read_box(io.BytesIO(data), e, whole(e.shape), "f") for n, e in entries.items()}
    assert all(values[name].shape == torch.Size(entry.shape) for name, entry in entries.items())
    assert sum(entry.num_bytes for entry in entries.values()) + 8 + size == len(data)


@pytest.mark.parametrize("depth", [10_000, 200_000])
def test_a_deep_header(depth: int) -> None:
    text = b"[" * depth
    data = len(text).to_bytes(8, "little") + text
    with pytest.raises(CheckpointError, match=r"^the-file: expected JSON"):
        read_header(io.BytesIO(data), len(data), "the-file")


def test_a_header_names_a_tensor_once() -> None:
    file = io.BytesIO()
    specs = {name: (torch.int8, (1,)) for name in "ab"}
    write_tensor_file(file, specs, [torch.zeros(2, dtype=torch.int8)])
    data = file.getvalue().replace(b'"b"', b'"a"')
    with pytest.raises(CheckpointError, match="a key occurs twice"):
        read_header(io.BytesIO(data), len(data), "the-file")
