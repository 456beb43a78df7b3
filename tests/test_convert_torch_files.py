"""Files of `torch.save` that mean harm or are broken: read or refused, never executed."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ilm_compile.convert.torch_file import TorchFile
from ilm_compile.convert.torch_pickle import read_state_dict
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.checkpoint.boxes import whole


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def torch_file(path: Path, pickled: bytes, *, compressed: bool = False) -> Path:
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", b"\0" * 64)
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_payload_is_not_executed(tmp_path: Path, protocol: int) -> None:
    pickled = pickle.dumps({"w": Payload(tmp_path / "executed")}, protocol=protocol)
    reason = "" if protocol == 0 else r"refers to \w+\.mkdir.*"
    with pytest.raises(IlmCompileError, match=f"{reason}nothing in it was executed"):
        TorchFile(torch_file(tmp_path / "x.pt", pickled))
    assert not (tmp_path / "executed").exists()


def good_pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2, 3), "v": nn.Parameter(torch.ones(4))}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        return archive.read(name)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_any_pickle_is_read_or_refused(data: st.DataObject) -> None:
    changed = bytearray(good_pickle())
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(changed[: data.draw(st.integers(0, len(changed)))])
    for text in (bytes(changed), cut, data.draw(st.binary(max_size=60))):
        try:
            found = read_state_dict(text, "the-file")
        except IlmCompileError as error:
            refusal = str(error)
        else:
            refusal = "the-file: "
            assert all(isinstance(name, str) for name in found)
        assert refusal.startswith("the-file: ")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_torch_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(6.0).view(2, 3)}, buffer)
    changed = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    path.write_bytes(
        changed[: data.draw(st.integers(0, len(changed)))] if data.draw(st.booleans()) else changed
    )
    refusal = str(path)
    try:
        file = TorchFile(path)
        for name, entry in file.entries.items():
            file.read(name, whole(entry.shape))
    except IlmCompileError as error:
        refusal = str(error)
    assert str(path) in refusal


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch_file(p, good_pickle(), compressed=True), "not compressed"),
        (lambda p: torch_file(p, pickle.dumps([1])), "expected a state dict, got list"),
        (lambda p: torch_file(p, pickle.dumps({"a": 1})), "expected tensors by name, got 'a': int"),
        (lambda p: p.write_bytes(b"not a zip"), "expected a file of torch.save"),
        (lambda p: torch.save({"w": torch.zeros(2, 3).t()}, p), "expected a contiguous tensor"),
        (
            lambda p: torch.save({"w": torch.zeros(1)}, p, _use_new_zipfile_serialization=False),
            "1.6",
        ),
    ],
)
def test_a_file_out_of_order_is_named(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "x.pt"
    make(path)
    with pytest.raises(IlmCompileError, match=f"x.pt.*{message}"):
        TorchFile(path)
