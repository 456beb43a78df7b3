"""The manifest: what a checkpoint holds and where, in JSON that says when it was changed.

The full tensors by name (``model/NAME``, ``optimizer/KEY/NAME``, ``random/RANK/SOURCE``), each with
the slices that make it up; the size and sha256 of every file; the plan and config of the run; and
the states that are no tensors. ``manifest.json`` is ``{"sha256": ..., "body": {...}}``, the hash
being that of the body written with sorted keys and no spaces. Its readers take nothing for granted:
each error is a `CheckpointError` that names the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ilm_compile.runtime.checkpoint.boxes import Box, whole
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.storage import MANIFEST
from ilm_compile.runtime.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, is_shape, load_json

FORMAT = "ilm_compile checkpoint"
VERSION = 1
MAX_MANIFEST_BYTES = 1 << 30
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")  # of no other folder
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Slice:
    """`box` of a full tensor is the tensor `key` of `file`."""

    file: str
    key: str
    box: Box


@dataclass(slots=True)
class Record:
    """A full tensor in the user's layout. is_number: a Python number, kept as a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    slices: list[Slice] = field(default_factory=list)
    is_number: bool = False


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

    def to_bytes(self) -> bytes:
        """The content of the file."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "torch": torch.__version__,
            "step": self.step,
            "num_steps": self.num_steps,
            "world_size": self.world_size,
            "plan": self.plan,
            "config": self.config,
            "states": self.states,
            "groups": self.groups,
            "parts": self.parts,
            "files": {n: {"size": f.size, "sha256": f.sha256} for n, f in self.files.items()},
            "tensors": {name: _record_json(record) for name, record in self.tensors.items()},
        }
        text = _canonical(body)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f'{{"sha256":"{digest}","body":{text}}}'.encode()

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> Manifest:
        """Read and check the content of the file at `path`."""
        outer = load_json(data, path)
        if set(outer) != {"sha256", "body"} or not isinstance(outer["body"], dict):
            raise CheckpointError(f"{path}: expected the keys sha256 and body, got {_some(outer)}")
        body = outer["body"]
        if (body.get("format"), body.get("version")) != (FORMAT, VERSION):
            raise CheckpointError(
                f"{path}: expected format {FORMAT!r} version {VERSION}, got "
                f"{body.get('format')!r:.100} version {body.get('version')!r:.100}"
            )
        if hashlib.sha256(_canonical(body).encode()).hexdigest() != outer["sha256"]:
            raise CheckpointError(f"{path}: its sha256 does not fit its content; it was changed")
        kinds = {
            "step": int, "num_steps": int, "world_size": int, "plan": dict, "config": dict,
            "states": dict, "groups": list, "parts": list, "files": dict, "tensors": dict,
        }  # fmt: skip
        for key, kind in kinds.items():
            if type(body.get(key)) is not kind:
                raise CheckpointError(
                    f"{path}: expected {key} to be {kind.__name__}, got {body.get(key)!r:.100}"
                )
        if body["step"] < 0 or body["world_size"] < 1:
            raise CheckpointError(f"{path}: expected a step and a world size, got a negative one")
        files = {name: _file(name, value, path) for name, value in body["files"].items()}
        tensors = {
            name: _record(value, files, f"{path}: {name!r:.200}")
            for name, value in body["tensors"].items()
        }
        rest = ("step", "num_steps", "world_size", "plan", "config", "states", "groups", "parts")
        manifest = cls(files=files, tensors=tensors, **{key: body[key] for key in rest})
        _check_groups(manifest, path)
        _check_keys(manifest, path)
        return manifest


def check_tiling(record: Record, where: str) -> None:
    """Raise `CheckpointError` unless the slices cover the tensor exactly once.

    A sweep over dimension 0: slices that begin before another one has ended must not meet it.
    """
    if not record.shape:
        overlaps = len(record.slices) > 1
    else:
        overlaps = _overlap([s.box for s in record.slices if s.box.numel])
    covered = sum(s.box.numel for s in record.slices)
    if overlaps or covered != whole(record.shape).numel:
        raise CheckpointError(
            f"{where}: expected slices that cover shape {list(record.shape)} exactly once, got "
            f"{covered} elements{' with overlaps' if overlaps else ''}"
        )


def _overlap(boxes: list[Box]) -> bool:
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.start):
        active = [other for other in active if other.stop[0] > box.start[0]]
        if any(box.intersect(other) is not None for other in active):
            return True
        active.append(box)
    return False


def _canonical(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def _record_json(record: Record) -> dict[str, Any]:
    result: dict[str, Any] = {
        "dtype": DTYPE_NAMES[record.dtype],
        "shape": list(record.shape),
        "slices": [[s.file, s.key, list(s.box.start), list(s.box.sizes)] for s in record.slices],
    }
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
    if not isinstance(value, dict) or not {"dtype", "shape", "slices"} <= set(value):
        raise CheckpointError(f"{where}: expected dtype, shape and slices, got {value!r:.200}")
    dtype, shape, slices = value["dtype"], value["shape"], value["slices"]
    if not isinstance(dtype, str) or dtype not in DTYPES or not is_shape(shape):
        raise CheckpointError(
            f"{where}: expected a dtype and a shape, got {dtype!r} {shape!r:.100}"
        )
    if not isinstance(slices, list):
        raise CheckpointError(f"{where}: expected a list of slices, got {slices!r:.100}")
    record = Record(DTYPES[dtype], tuple(shape), [], value.get("is_number") is True)
    record.slices = [_slice(each, files, record, where) for each in slices]
    check_tiling(record, where)
    return record


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


def _check_keys(manifest: Manifest, path: str) -> None:
    """Each tensor of a file is used once, so that what is read is bounded by what is there."""
    seen: set[tuple[str, str]] = set()
    for name, record in manifest.tensors.items():
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
