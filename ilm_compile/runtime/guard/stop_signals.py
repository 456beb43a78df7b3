"""The signals that ask a training to save and end: of a scheduler, a closed terminal, Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from ilm_compile.runtime.guard.activity import ACTIVITY

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class StopSignals:
    """From `install` to `restore`, calls ``ask(name)`` at the first signal; later ones ask no more.

    A second Ctrl-C means it: what handled it before is called. Nothing happens outside of the main
    thread, where Python handles signals.
    """

    def __init__(self, ask: Callable[[str], object]) -> None:
        self._ask = ask
        self._previous: dict[signal.Signals, Any] = {}
        self._is_asked = False

    def install(self) -> None:
        """Handle the signals from here on."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {each: signal.signal(each, self._handle) for each in SIGNALS}

    def restore(self) -> None:
        """Leave them to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before = self._previous.get(signal.Signals(number))
        if self._is_asked and number == signal.SIGINT and callable(before):
            before(number, frame)
        elif not self._is_asked:
            self._is_asked = True
            self._ask(signal.Signals(number).name)


def heed_no_second_signal() -> None:
    """A process that has saved and is about to end is not to be killed by another SIGTERM.

    Until then the signals end it as they always do, where nobody else handles them.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _end_unless_stopping)


def _end_unless_stopping(number: int, frame: FrameType | None) -> None:
    if not ACTIVITY.stopping:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
