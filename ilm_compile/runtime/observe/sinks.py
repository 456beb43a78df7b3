"""Where alerts go: the log, a webhook, a command.

A sink may be slow and may fail; `Dispatcher` calls it from a thread of its own, so neither reaches
the training.
"""

from __future__ import annotations

import json
import logging
import queue
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from ilm_compile.errors import IlmCompileError

LOGGER = logging.getLogger("ilm_compile.monitor")
TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Alert:
    """Something a person should know. kind: a word for machines, such as "loss-spike"."""

    kind: str
    message: str
    job: str
    rank: int
    step: int
    time: float = field(default_factory=time.time)

    def text(self) -> str:
        """One line for people."""
        return f"[{self.job}] {self.kind}, rank {self.rank}, step {self.step}: {self.message}"


class Sink(Protocol):
    """Takes alerts; may raise, and may take its time."""

    def send(self, alert: Alert) -> None: ...


class LogSink:
    """Writes alerts to the logger "ilm_compile.monitor" as warnings."""

    def send(self, alert: Alert) -> None:
        LOGGER.warning("%s", alert.text())


# The body of a webhook's request, by who reads it.
_BODIES: dict[str, Callable[[Alert], Mapping[str, object]]] = {
    "feishu": lambda alert: {"msg_type": "text", "content": {"text": alert.text()}},
    "slack": lambda alert: {"text": alert.text()},
    "json": asdict,
}


class Webhook:
    """Posts alerts as JSON to an address. style: "feishu", "slack", or "json" for the alert itself.

    The address usually holds a secret: it appears in no message, of which only the host is part.
    Raises `IlmCompileError` for another style, and for an address that is not http or https.
    """

    def __init__(self, url: str, *, style: str = "json", timeout_s: float = TIMEOUT_S) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise IlmCompileError(
                f"webhook: expected an address that starts with https:// or http://, got one with "
                f"scheme {parts.scheme!r}"
            )
        if style not in _BODIES:
            raise IlmCompileError(f"webhook: style must be one of {sorted(_BODIES)}, got {style!r}")
        self._url = url
        self._host = parts.hostname
        self._body = _BODIES[style]
        self._timeout_s = timeout_s

    def __repr__(self) -> str:
        return f"Webhook to {self._host}"

    def send(self, alert: Alert) -> None:
        request = urllib.request.Request(
            self._url,
            data=json.dumps(self._body(alert)).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                answer.read(1024)
        except urllib.error.HTTPError as error:
            raise IlmCompileError(f"{self}: answered {error.code}") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise IlmCompileError(f"{self}: {type(reason).__name__}") from None


class Command:
    """Runs a program with the alert's line as its last argument, and as JSON on its input.

    argv: the program and its arguments. No shell reads them, so nothing in an alert can be taken
    for a command.
    """

    def __init__(self, argv: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> None:
        if isinstance(argv, str) or not argv:
            raise IlmCompileError(
                f"monitor command: expected a list of program and arguments, got {argv!r}"
            )
        self._argv = list(argv)
        self._timeout_s = timeout_s

    def __repr__(self) -> str:
        return f"command {self._argv[0]}"

    def send(self, alert: Alert) -> None:
        try:
            done = subprocess.run(
                [*self._argv, alert.text()],
                input=json.dumps(asdict(alert)).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=self._timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise IlmCompileError(f"{self}: took longer than {self._timeout_s:g} s") from None
        if done.returncode:
            raise IlmCompileError(f"{self}: exit status {done.returncode}")


class Dispatcher:
    """Hands alerts to every sink, in a thread of its own. A sink that fails is logged, no more."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        # A SimpleQueue may be put to from a signal handler.
        self._alerts: queue.SimpleQueue[Alert | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="monitor-alerts", daemon=True)
        self._thread.start()

    def put(self, alert: Alert) -> None:
        """Returns at once."""
        self._alerts.put(alert)

    def close(self, timeout_s: float) -> None:
        """Wait until what was put is sent, at most `timeout_s`; what is left then is lost."""
        self._alerts.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (alert := self._alerts.get()) is not None:
            for sink in self._sinks:
                try:
                    sink.send(alert)
                except Exception as error:
                    LOGGER.warning("an alert could not be sent: %s", error)
