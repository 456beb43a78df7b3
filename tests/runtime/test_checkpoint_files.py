"""Boxes of full tensors, safetensors files by byte ranges, and manifests, each on its own."""

from __future__ import annotations

import io
import json
import os
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ilm_compile.program.placement import I, Placement, S, split_shards
from ilm_compile.program.program import Variable
from ilm_compile.runtime.checkpoint.boxes import Box, held_boxes, whole
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import File, Manifest, Record, Slice
from ilm_compile.runtime.checkpoint.slices import SliceReader
from ilm_compile.runtime.checkpoint.storage import LocalStorage
from ilm_compile.runtime.checkpoint.tensor_file import (
    DTYPES,
    read_box,
    read_header,
    write_tensor_file,
)
from tests.support.layouts import tp, tp_place

# Boxes


def variable(shape: tuple[int, ...], placement: Placement = I, padding: int = 0) -> Variable:
    return Variable("w", shape, torch.float64, True, True, layout=tp(placement), padding=padding)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Variable, int, int | None]:
    """A variable, the number of tp ranks, and that of dp ranks if dp cuts it."""
    size = draw(st.integers(1, 4))
    ndim = draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 5)) for _ in range(ndim)]
    placement = I
    if size > 1 and draw(st.booleans()):
        dim = draw(st.integers(0, ndim - 1))
        segments = [size * draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]
        shape[dim] = sum(segments)
        placement = S(dim, segments)
    # Padding may reach over several ranks, as where a small vocabulary meets many.
    padding = draw(st.integers(0, shape[0] - 1)) if not placement.segments else 0
    dp = draw(st.none() | st.integers(1, 5))
    return variable(tuple(shape), placement, padding), size, dp


@settings(max_examples=300, deadline=None)
@given(cuts())
def test_the_boxes_of_all_ranks_give_the_full_tensor_back(
    case: tuple[Variable, int, int | None],
) -> None:
    """Against `split_shards` and `Tensor.chunk`, which is what materialising and FSDP do."""
    what, size, dp = case
    full = torch.arange(prod(what.user_shape), dtype=torch.float64).view(what.user_shape)
    cut = what.layout.on("tp")
    parts = split_shards(what.pad(full), cut, size) if cut.is_shard else None
    seen = torch.zeros(what.user_shape)
    for rank in range(size):
        own = what.pad(full) if parts is None else parts[rank]
        for d in range(dp or 1):
            local, stored = own, None
            if dp is not None:
                chunks = own.chunk(dp)
                local = chunks[d] if d < len(chunks) else own[:0]
                start = min(-(-own.shape[0] // dp) * d, own.shape[0])
                stored = Box((start, *[0] * (own.ndim - 1)), tuple(local.shape))
            for held in held_boxes(what, tp_place(rank, size), stored=stored):
                assert torch.equal(held.own.of(local), held.full.of(full))
                held.full.of(seen).add_(1)
    assert bool((seen == (size if parts is None else 1)).all())


def test_the_box_of_a_scalar() -> None:
    (held,) = held_boxes(variable(()), tp_place(0, 1))
    assert held.full == whole(())
    assert held.own.of(torch.tensor(3.0)) == 3


# Safetensors


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, dtype in DTYPES.items():
        found[name] = torch.randint(0, 2, (3, 4)).to(dtype)
    return found | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


def test_our_files_are_read_by_the_safetensors_package(tmp_path: Path) -> None:
    values = tensors()
    with (tmp_path / "x").open("wb") as file:
        specs = {name: (value.dtype, tuple(value.shape)) for name, value in values.items()}
        write_tensor_file(file, specs, values.values(), {"format": "pt"})
    found = load_file(tmp_path / "x")
    assert found.keys() == values.keys()
    assert all(_equal(found[name], values[name]) for name in values)


def test_their_files_are_read_by_us(tmp_path: Path) -> None:
    values = tensors()
    save_file(values, tmp_path / "x")
    with (tmp_path / "x").open("rb") as file:
        entries = read_header(file, (tmp_path / "x").stat().st_size, "x")
        assert entries.keys() == values.keys()
        for name, entry in entries.items():
            assert _equal(read_box(file, entry, whole(entry.shape), "x"), values[name])


@pytest.mark.parametrize("limit", [1, 100, 1 << 20])
def test_a_box_is_read_in_pieces(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ilm_compile.runtime.checkpoint.tensor_file.READ_BYTES", limit)
    value = torch.arange(5 * 6 * 7).view(5, 6, 7)
    file = io.BytesIO()
    write_tensor_file(file, {"a": (value.dtype, (5, 6, 7))}, [value[:2], value[2:]])
    entry = read_header(file, len(file.getvalue()), "x")["a"]
    for start, sizes in [((0, 0, 0), (5, 6, 7)), ((1, 2, 3), (3, 2, 4)), ((4, 5, 6), (1, 1, 1))]:
        box = Box(start, sizes)
        assert torch.equal(read_box(file, entry, box, "x"), box.of(value))


def test_data_that_do_not_fit_the_header_are_refused() -> None:
    with pytest.raises(CheckpointError, match="expected 8 bytes of data, was given 4"):
        write_tensor_file(io.BytesIO(), {"a": (torch.float32, (2,))}, [torch.zeros(1)])


@pytest.mark.parametrize("offsets", [[[0, 1], [0, 1]], [[0, 1], [2, 3]], [[1, 2], [2, 3]]])
def test_holes_and_overlaps_in_a_file_are_refused(offsets: list[list[int]]) -> None:
    """Even where the end is right: two names of one byte could each be changed by the other."""
    fields = {"dtype": "I8", "shape": [1]}
    header = {name: {**fields, "data_offsets": at} for name, at in zip("ab", offsets, strict=True)}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(max(stop for _, stop in offsets))
    with pytest.raises(CheckpointError, match="x: expected the data of"):
        read_header(io.BytesIO(data), len(data), "x")


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(
        first.contiguous().view(-1).view(torch.uint8),
        second.contiguous().view(-1).view(torch.uint8),
    )


# Manifests and slices


def manifest_of(record: Record, **changes: object) -> Manifest:
    manifest = Manifest(1, 1, {}, {}, {}, [], {"f": File(64, "0" * 64)}, {"model/w": record})
    for key, value in changes.items():
        setattr(manifest, key, value)
    return manifest


def record_of(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Record:
    slices = [Slice("f", str(i), Box(start, sizes)) for i, (start, sizes) in enumerate(boxes)]
    return Record(torch.float32, (4, 4), slices)


def test_a_manifest_comes_back() -> None:
    manifest = manifest_of(record_of(((0, 0), (4, 2)), ((0, 2), (4, 2))), states={"a": [1.5, None]})
    assert Manifest.from_bytes(manifest.to_bytes(), "m") == manifest


@pytest.mark.parametrize(
    "boxes",
    [
        [],
        [((0, 0), (4, 3))],
        [((0, 0), (4, 4)), ((0, 0), (1, 1))],
        [((0, 0), (2, 4)), ((1, 0), (2, 4))],  # as many elements as there are, one row twice
        [((0, 0), (2, 4)), ((2, 0), (2, 5))],
        [((0, 0, 0), (4, 4, 1))],
    ],
)
def test_slices_that_do_not_tile_are_refused(
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    data = manifest_of(record_of(*boxes)).to_bytes()
    with pytest.raises(CheckpointError, match=r"m: 'model/w': .*(exactly once|lies outside)"):
        Manifest.from_bytes(data, "m")


def test_a_slice_larger_than_its_file_is_refused() -> None:
    """Before memory for it is asked for."""
    huge = Record(torch.float64, (2**40,), [Slice("f", "0", whole((2**40,)))])
    with pytest.raises(CheckpointError, match="is more than f holds"):
        Manifest.from_bytes(manifest_of(huge).to_bytes(), "m")


def test_a_tensor_used_twice_is_refused() -> None:
    record = record_of(((0, 0), (4, 2)), ((0, 2), (4, 2)))
    record.slices[1] = Slice("f", "0", record.slices[1].box)
    with pytest.raises(CheckpointError, match="'0' of f is used twice"):
        Manifest.from_bytes(manifest_of(record).to_bytes(), "m")


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b/..", "manifest.json", "x\0", "-" * 300],
)
def test_a_file_of_another_folder_is_refused(name: str) -> None:
    data = manifest_of(Record(torch.float32, (0,)), files={name: File(0, "0" * 64)}).to_bytes()
    with pytest.raises(CheckpointError, match="is not the name of a file beside it"):
        Manifest.from_bytes(data, "m")


@pytest.mark.parametrize("change", ["longer", "dtype"])
def test_a_file_that_is_not_what_the_manifest_says_is_named(tmp_path: Path, change: str) -> None:
    (tmp_path / "c").mkdir()
    value = torch.zeros(5) if change == "longer" else torch.zeros(4, dtype=torch.int32)
    save_file({"0": value}, tmp_path / "c" / "f")
    record = Record(torch.float32, (4,), [Slice("f", "0", whole((4,)))])
    with (
        SliceReader(LocalStorage(tmp_path), "c", manifest_of(record)) as reader,
        pytest.raises(CheckpointError, match=r"c/f: expected '0' to be torch.float32 \[4\], got"),
    ):
        reader.read("model/w")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"")
    (tmp_path / "f").symlink_to("secret")
    with pytest.raises(OSError, match="symbolic links"), LocalStorage(tmp_path).open("f"):
        pass


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f")
    with (
        pytest.raises(CheckpointError, match="expected a regular file"),
        LocalStorage(tmp_path).open("f"),
    ):
        pass
