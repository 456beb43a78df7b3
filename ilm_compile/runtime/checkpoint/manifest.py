"""The manifest: what a checkpoint holds and where, in JSON that says when it was changed.

The full tensors by name (``model/NAME``, ``optimizer/KEY/NAME``), each with the ranks that wrote
slices of it; the plan and config of the run; and the states that are no tensors. Slices and files
are in the part of the rank that wrote them (`parts`), so that the manifest does not grow with the
number of ranks. That of version 1 held all of it, ``random/RANK/SOURCE`` too, and is still read.

``manifest.json`` is ``{"sha256": ..., "body": {...}}``, the hash being that of the body written
with sorted keys and no spaces. Its readers take nothing for granted: each error is a
`CheckpointError` that names the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ilm_compile.runtime.checkpoint.boxes import Box, whole
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.storage import MANIFEST
from ilm_compile.runtime.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, is_shape, load_json

FORMAT = "ilm_compile checkpoint"
WHOLE, SPLIT = 1, 2  # versions
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")  # of no other folder
_SHA256 = re.compile(r"[0-9a-f]{64}")
Ranks = tuple[tuple[int, int, int], ...]  # (first, last, step), several times


@dataclass(frozen=True, slots=True)
class Slice:
    """`box` of a full tensor is the tensor `key` of `file`."""

    file: str
    key: str
    box: Box


@dataclass(slots=True)
class Record:
    """A full tensor in the user's layout. is_number: a Python number, kept as a tensor.

    writers: the ranks whose parts have slices of it, where `slices` are not here.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    slices: list[Slice] = field(default_factory=list)
    is_number: bool = False
    writers: Ranks = ()


@dataclass(frozen=True, slots=True)
class File:
    """Size in bytes and hash of a file."""

    size: int
    sha256: str


@dataclass(slots=True)
class Manifest:
    """What `manifest.json` says. plan: of the run that saved. states, groups: plain JSON."""

    step: int
    world_size: int
    plan: dict[str, Any]
    config: dict[str, Any]
    states: dict[str, Any]
    groups: list[dict[str, Any]]  # param groups of the optimizer, "params" being names
    files: dict[str, File] = field(default_factory=dict)
    tensors: dict[str, Record] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)  # what is in it: "model", "optimizer", ...
    num_steps: int = 0  # `Parallel.num_steps`, which dropout depends on
    save: str = ""  # that its parts name; "" where all of it is here

    def to_bytes(self) -> bytes:
        """The content of the file."""
        sets = list(dict.fromkeys(record.writers for record in self.tensors.values()))
        rest: dict[str, Any] = {"version": WHOLE, "files": files_json(self.files)}
        rest["tensors"] = {name: record_json(record) for name, record in self.tensors.items()}
        if self.save:
            rest = {"version": SPLIT, "save": self.save, "writers": sets}
            rest["tensors"] = {
                name: {**_kind_json(record), "writers": sets.index(record.writers)}
                for name, record in self.tensors.items()
            }
        body = {
            "format": FORMAT,
            "torch": torch.__version__,
            "step": self.step,
            "num_steps": self.num_steps,
            "world_size": self.world_size,
            "plan": self.plan,
            "config": self.config,
            "states": self.states,
            "groups": self.groups,
            "parts": self.parts,
            **rest,
        }
        return seal(body)

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> Manifest:
        """Read and check the content of the file at `path`."""
        body = unseal(data, path, FORMAT, (WHOLE, SPLIT))
        kinds = {
            "step": int, "num_steps": int, "world_size": int, "plan": dict, "config": dict,
            "states": dict, "groups": list, "parts": list,
        }  # fmt: skip
        check_kinds(body, {**kinds, "tensors": dict}, path)
        if body["step"] < 0 or body["world_size"] < 1:
            raise CheckpointError(f"{path}: expected a step and a world size, got a negative one")
        manifest = cls(**{key: body[key] for key in kinds})
        if body["version"] == WHOLE:
            manifest.files, manifest.tensors = read_contents(body, path)
            for name, record in manifest.tensors.items():
                check_tiling(record, f"{path}: {name!r:.200}")
        else:
            check_kinds(body, {"save": str, "writers": list}, path)
            manifest.save = body["save"] or "?"
            sets = [_ranks(each, manifest.world_size, path) for each in body["writers"]]
            manifest.tensors = {
                name: _split_record(value, sets, f"{path}: {name!r:.200}")
                for name, value in body["tensors"].items()
            }
        _check_groups(manifest, path)
        return manifest


def seal(body: dict[str, Any]) -> bytes:
    """The content of a file that says by its hash when it was changed."""
    text = _canonical(body)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256":"{digest}","body":{text}}}'.encode()


def unseal(data: bytes, path: str, kind: str, versions: Collection[int]) -> dict[str, Any]:
    """The body that `seal` was given, of this format and one of these versions."""
    outer = load_json(data, path)
    if set(outer) != {"sha256", "body"} or not isinstance(outer["body"], dict):
        raise CheckpointError(f"{path}: expected the keys sha256 and body, got {_some(outer)}")
    body: dict[str, Any] = outer["body"]
    found = body.get("format"), body.get("version")
    if found[0] != kind or type(found[1]) is not int or found[1] not in versions:
        raise CheckpointError(
            f"{path}: expected format {kind!r} version {' or '.join(map(str, versions))}, got "
            f"{found[0]!r:.100} version {found[1]!r:.100}"
        )
    if hashlib.sha256(_canonical(body).encode()).hexdigest() != outer["sha256"]:
        raise CheckpointError(f"{path}: its sha256 does not fit its content; it was changed")
    return body


def check_kinds(body: Mapping[str, Any], kinds: Mapping[str, type], path: str) -> None:
    """Raise `CheckpointError` unless `body` has these keys with values of these types."""
    for key, kind in kinds.items():
        if type(body.get(key)) is not kind:
            raise CheckpointError(
                f"{path}: expected {key} to be {kind.__name__}, got {body.get(key)!r:.100}"
            )


def read_contents(body: Mapping[str, Any], path: str) -> tuple[dict[str, File], dict[str, Record]]:
    """The files, and the tensors with the slices that are in them, each of which is used once."""
    check_kinds(body, {"files": dict, "tensors": dict}, path)
    files = {name: _file(name, value, path) for name, value in body["files"].items()}
    tensors = {
        name: _record(value, files, f"{path}: {name!r:.200}")
        for name, value in body["tensors"].items()
    }
    _check_keys(tensors, path)
    return files, tensors


def check_tiling(record: Record, where: str) -> None:
    """Raise `CheckpointError` unless the slices cover the tensor exactly once."""
    check_cover([s.box for s in record.slices], whole(record.shape), where)


def check_cover(boxes: list[Box], wanted: Box, where: str) -> None:
    """Raise `CheckpointError` unless `boxes`, which lie in `wanted`, cover it exactly once."""
    overlaps = len(boxes) > 1 if not wanted.sizes else _overlap([b for b in boxes if b.numel])
    covered = sum(box.numel for box in boxes)
    if overlaps or covered != wanted.numel:
        raise CheckpointError(
            f"{where}: expected slices that cover shape {list(wanted.sizes)} exactly once, got "
            f"{covered} elements{' with overlaps' if overlaps else ''}"
        )


def _overlap(boxes: list[Box]) -> bool:
    """A sweep over dimension 0: those that begin before another has ended must not meet it."""
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.start):
        active = [other for other in active if other.stop[0] > box.start[0]]
        if any(box.intersect(other) is not None for other in active):
            return True
        active.append(box)
    return False


def _canonical(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def files_json(files: Mapping[str, File]) -> dict[str, Any]:
    """What `read_contents` reads."""
    return {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()}


def record_json(record: Record) -> dict[str, Any]:
    """What `read_contents` reads."""
    slices = [[s.file, s.key, list(s.box.start), list(s.box.sizes)] for s in record.slices]
    return {**_kind_json(record), "slices": slices}


def _kind_json(record: Record) -> dict[str, Any]:
    result = {"dtype": DTYPE_NAMES[record.dtype], "shape": list(record.shape)}
    return result | ({"is_number": True} if record.is_number else {})


def _file(name: str, value: object, path: str) -> File:
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
        raise CheckpointError(f"{path}: {name!r:.200} is not the name of a file beside it")
    if (
        not isinstance(value, dict)
        or set(value) != {"size", "sha256"}
        or type(value["size"]) is not int
        or not isinstance(value["sha256"], str)
        or not _SHA256.fullmatch(value["sha256"])
    ):
        raise CheckpointError(f"{path}: {name}: expected size and sha256, got {value!r:.200}")
    return File(value["size"], value["sha256"])


def _record(value: object, files: dict[str, File], where: str) -> Record:
    record, slices = _kind(value, "slices", where)
    if not isinstance(slices, list):
        raise CheckpointError(f"{where}: expected a list of slices, got {slices!r:.100}")
    record.slices = [_slice(each, files, record, where) for each in slices]
    return record


def _split_record(value: object, sets: Sequence[Ranks], where: str) -> Record:
    record, index = _kind(value, "writers", where)
    if type(index) is not int or not 0 <= index < len(sets):
        raise CheckpointError(f"{where}: expected a number below {len(sets)}, got {index!r:.100}")
    record.writers = sets[index]
    return record


def _kind(value: object, key: str, where: str) -> tuple[Record, object]:
    """A record without what is under `key`, and that."""
    if not isinstance(value, dict) or not {"dtype", "shape", key} <= set(value):
        raise CheckpointError(f"{where}: expected dtype, shape and {key}, got {value!r:.200}")
    dtype, shape = value["dtype"], value["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPES or not is_shape(shape):
        raise CheckpointError(
            f"{where}: expected a dtype and a shape, got {dtype!r} {shape!r:.100}"
        )
    return Record(DTYPES[dtype], tuple(shape), [], value.get("is_number") is True), value[key]


def _ranks(value: object, world_size: int, path: str) -> Ranks:
    """Every so many ranks from one to another, several times."""
    for run in value if isinstance(value, list) and value else [None]:
        numbers = run if isinstance(run, list) and set(map(type, run)) == {int} else []
        if len(numbers) != 3 or not (0 <= numbers[0] <= numbers[1] < world_size and numbers[2] > 0):
            raise CheckpointError(
                f"{path}: expected ranks below {world_size} as [first, last, step], got "
                f"{value!r:.200}"
            )
    return tuple((first, last, step) for first, last, step in value)  # type: ignore[attr-defined]


def _slice(value: object, files: dict[str, File], record: Record, where: str) -> Slice:
    if not isinstance(value, list) or len(value) != 4:
        raise CheckpointError(f"{where}: expected [file, key, start, sizes], got {value!r:.200}")
    file, key, start, sizes = value
    if not isinstance(file, str) or file not in files:
        raise CheckpointError(f"{where}: its file {file!r:.200} is not among the files")
    if not isinstance(key, str) or not is_shape(start) or not is_shape(sizes):
        raise CheckpointError(f"{where}: expected [file, key, start, sizes], got {value!r:.200}")
    if not len(start) == len(sizes) == len(record.shape) or any(
        a + n > limit for a, n, limit in zip(start, sizes, record.shape, strict=True)
    ):
        raise CheckpointError(f"{where}: the slice {start} {sizes} lies outside {record.shape}")
    box = Box(tuple(start), tuple(sizes))
    if box.numel * record.dtype.itemsize > files[file].size:
        raise CheckpointError(f"{where}: a slice of {sizes} is more than {file} holds")
    return Slice(file, key, box)


def _check_keys(tensors: Mapping[str, Record], path: str) -> None:
    """Each tensor of a file is used once, so that what is read is bounded by what is there."""
    seen: set[tuple[str, str]] = set()
    for name, record in tensors.items():
        for piece in record.slices:
            if (piece.file, piece.key) in seen:
                raise CheckpointError(
                    f"{path}: {name!r:.200}: {piece.key!r:.200} of {piece.file} is used twice"
                )
            seen.add((piece.file, piece.key))


def _check_groups(manifest: Manifest, path: str) -> None:
    for group in manifest.groups:
        params = group.get("params") if isinstance(group, dict) else None
        if not isinstance(params, list) or not all(isinstance(n, str) for n in params):
            raise CheckpointError(f"{path}: expected a param group with params, got {group!r:.200}")
    if not all(isinstance(part, str) for part in manifest.parts):
        raise CheckpointError(f"{path}: expected parts to be names, got {manifest.parts!r:.200}")


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:5])[:200] or "nothing"
