"""Reads which tensors a file of `torch.save` holds, executing nothing.

The file is a zip whose member ``data.pkl`` is a pickle that refers to storages by key. A pickle is
a program for a stack machine; its danger are the opcodes that look up a Python name and call it.
Here names are only compared with a list and never looked up, and the few calls that a state dict of
tensors needs are carried out as data. `torch.load(weights_only=True)` has the same aim, but calls
what its list allows, has been bypassed before (CVE-2025-32434) and reads whole storages; this
reader gives the place of each tensor in the file instead, so that slices can be read.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ilm_compile.errors import IlmCompileError

_STORAGES = {
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
}
_DICT = ("collections", "OrderedDict")
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = ("torch._utils", "_rebuild_parameter")
_KNOWN = {*_STORAGES, _DICT, _TENSOR, _PARAMETER}


@dataclass(frozen=True, slots=True)
class Name:
    """A Python name, as text."""

    module: str
    name: str

    @property
    def pair(self) -> tuple[str, str]:
        """Both parts."""
        return self.module, self.name


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage of `numel` elements, the member ``data/KEY`` of the zip."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor in a storage; `offset` and `stride` count elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    """The mark of the stack machine."""


def read_state_dict(data: bytes, path: str) -> dict[str, TensorRef]:
    """The tensors of a pickled state dict, by name. Raises `IlmCompileError` for anything else."""
    try:
        result = _Machine().run(data)
    except (ValueError, IndexError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise IlmCompileError(
            f"{path}: expected a state dict of tensors as torch.save writes it: "
            f"{str(error)[:200] or type(error).__name__}; nothing in it was executed"
        ) from None
    if not isinstance(result, dict):
        raise IlmCompileError(f"{path}: expected a state dict, got {type(result).__name__}")
    for name, value in result.items():
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            raise IlmCompileError(
                f"{path}: expected tensors by name, got {name!r:.100}: {type(value).__name__}"
            )
    return result


class _Machine:
    """The stack machine, for the opcodes that a state dict of tensors needs."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name not in _OPCODES:
                raise ValueError(f"the pickle opcode {opcode.name} has no place in one")
            _OPCODES[opcode.name](self, argument)
        raise ValueError("it has no end")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def memoize(self, _: object) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def take(self, number: int) -> list[Any]:
        """The topmost `number` values, off the stack."""
        if number > len(self._stack):
            raise ValueError("it takes more values than there are")
        taken = self._stack[len(self._stack) - number :]
        del self._stack[len(self._stack) - number :]
        return taken

    def take_to_mark(self) -> list[Any]:
        """The values above the mark, off the stack together with it."""
        values: list[Any] = []
        while not isinstance(value := self._stack.pop(), _Mark):
            values.append(value)
        return values[::-1]

    def name(self, module: str, name: str) -> None:
        if (module, name) not in _KNOWN:
            raise ValueError(f"it refers to {module}.{name}, which is no part of a tensor")
        self._stack.append(Name(module, name))

    def global_(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.name(module, name)

    def stack_global(self, _: object) -> None:
        module, name = self.take(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it refers to a name that is no text")
        self.name(module, name)

    def persistent(self, _: object) -> None:
        kind, storage, key, _location, numel = self._stack.pop()
        if kind != "storage" or storage.pair not in _STORAGES or type(numel) is not int:
            raise ValueError("it refers to something that is no storage")
        if not isinstance(key, str) or not key.isalnum():
            raise ValueError("it refers to a storage by no number")
        self.push(StorageRef(key, _STORAGES[storage.pair], numel))

    def set_items(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("it sets items of something that is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):
                raise ValueError("it has a key that is no text")
            target[key] = value

    def append_items(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise ValueError("it appends to something that is no list")
        self._stack[-1].extend(values)

    def reduce(self, _: object) -> None:
        function, arguments = self.take(2)
        if not isinstance(function, Name) or function.pair not in _CALLS:
            raise ValueError("it calls something that is no tensor")
        self.push(_CALLS[function.pair](*arguments))

    def build(self, _: object) -> None:
        """A state for the object below: an OrderedDict's `_metadata`, which says nothing here."""
        self.take(1)


def _tensor(
    storage: StorageRef,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: bool = False,
    _hooks: object = None,
    _metadata: object = None,
) -> TensorRef:
    sizes = (offset, *shape, *stride)
    if not isinstance(storage, StorageRef) or any(type(n) is not int or n < 0 for n in sizes):
        raise ValueError("it makes a tensor of no storage")
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


def _parameter(data: Any, _requires_grad: bool = True, _hooks: object = None) -> Any:
    return data


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    _DICT: lambda items=(): dict(items),
    _TENSOR: _tensor,
    _PARAMETER: _parameter,
}
_VALUES = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
)
_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.push(_Mark()),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **{name: _Machine.push for name in _VALUES},
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.take_to_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.take(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.take(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.take(3))),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "MEMOIZE": _Machine.memoize,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "BINPERSID": _Machine.persistent,
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.take_to_mark()),
    "APPEND": lambda machine, _: machine.append_items(machine.take(1)),
    "APPENDS": lambda machine, _: machine.append_items(machine.take_to_mark()),
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
