"""The stop file: a number in a file tells a running job to save, and to end.

InternLM's convention (InternEvo internlm/checkpoint/checkpoint_manager.py, quit_signal_handler):
``+N`` saves at step N and ends the training, ``-N`` saves at step N and goes on, 0 does nothing.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from ilm_compile.runtime.checkpoint.errors import CheckpointError

MAX_BYTES = 100
_NUMBER = re.compile(r"[+-]?[0-9]{1,15}")


@dataclass(frozen=True, slots=True)
class Order:
    """What the file asks for at the present step."""

    save: bool = False
    stop: bool = False


class StopFile:
    """Reads the file on rank 0. It is made, holding 0, when training begins."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = ""  # what was obeyed or warned of

    def create(self) -> None:
        """Write 0: what an earlier run was told does not count. Raises `CheckpointError`."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("0\n")
        except OSError as error:
            raise CheckpointError(f"stop file {self._path} cannot be written: {error}") from error

    def order(self, step: int) -> Order:
        """The order for `step`. A file that is missing or holds no number orders nothing."""
        try:
            with self._path.open("rb") as file:
                text = file.read(MAX_BYTES).decode(errors="replace").strip()
        except OSError:
            return Order()
        if not text or not _NUMBER.fullmatch(text):
            # An empty file is one that an editor is about to write.
            self._warn(f"expected +N, -N or 0, got {text!r}", text)
            return Order()
        number = int(text)
        if abs(number) == step:
            self._seen = text
        elif 0 < abs(number) < step:
            self._warn(f"step {abs(number)} has passed, this is step {step}", text)
        return Order(save=abs(number) == step, stop=number == step)

    def _warn(self, message: str, text: str) -> None:
        if text and text != self._seen:
            self._seen = text
            warnings.warn(f"stop file {self._path}: {message}; it is ignored", stacklevel=3)
