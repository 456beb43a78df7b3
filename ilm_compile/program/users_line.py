"""The user's line of code that is being run, for a refusal in the middle of a capture."""

from __future__ import annotations

import functools
import linecache
import re
import sys
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch
from torch import fx
from torch.fx.traceback import set_stack_trace
from torch.overrides import TorchFunctionMode

from ilm_compile.program.program import Source

_FRAME = re.compile(r'\s*File "(?P<file>.+)", line (?P<line>\d+)')
_CAPTURE = str(Path(__file__).parent)
_NOT_THE_USERS = (str(Path(torch.__file__).parent), _CAPTURE, "<eval_with_key>")


def is_users_file(filename: str) -> bool:
    """Whether a stack frame in `filename` is the user's: not torch's, not of the capture."""
    return not filename.startswith(_NOT_THE_USERS)


def users_line() -> str:
    """Return " (at file:line: code)" of the innermost frame that is the user's, or nothing."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if is_users_file(name):
            code = linecache.getline(name, frame.f_lineno).strip()
            return f" (at {name}:{frame.f_lineno}: {code})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def called_from(module: ModuleType) -> bool:
    """Whether the innermost frame that is not of the capture is in the file of `module`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_CAPTURE):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == module.__file__


class NotedLines(TorchFunctionMode):
    """While active, the nodes of a capture are told the user's line: see `source_of`.

    torch would find it from the whole stack of every node, which is a third of the time of a trace.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not _is_users_forward(frame.f_code):
            frame = frame.f_back
        # Where there is none, that of the capture: torch would look for another.
        name, line = (frame.f_code.co_filename, frame.f_lineno) if frame else (_CAPTURE, 0)
        set_stack_trace([f'File "{name}", line {line}'])
        return func(*args, **(kwargs or {}))


@functools.cache
def _is_users_forward(code: CodeType) -> bool:
    return code.co_name == "forward" and is_users_file(code.co_filename)


def defined_at(function: Any) -> str:
    """Return the words that name a function and say where it is written."""
    while isinstance(function, functools.partial):
        function = function.func
    method = vars(type(function)).get("__call__")  # of an object that is called
    code = getattr(function, "__code__", None) or getattr(method, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else str(name)


def source_of(node: fx.Node) -> Source:
    """Return where a node of an exported graph comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    frames = map(_FRAME.match, (node.meta.get("stack_trace") or "").splitlines())
    lines = [f"{f['file']}:{f['line']}" for f in frames if f and is_users_file(f["file"])]
    return Source(path.removeprefix("model").removeprefix("."), lines[-1] if lines else "")
