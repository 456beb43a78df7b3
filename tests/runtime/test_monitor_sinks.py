"""Where alerts go: webhooks and commands get them, and harm nothing when they fail."""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.observe import Command, Monitor, Webhook
from ilm_compile.runtime.observe.sinks import Alert, Dispatcher
from tests.runtime.watching import At, spoil_loss, train


class Server(HTTPServer):
    """Keeps the bodies it is sent; answers with `status` after `delay_s`."""

    status, delay_s = 200, 0.0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook/s3cret-token"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append((self.path, self.headers["Content-Type"], json.loads(body)))
        time.sleep(self.server.delay_s)
        try:
            self.send_response(self.server.status)
            self.end_headers()
        except OSError:  # the client did not wait
            pass

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


ALERT = Alert("stuck", 'no step; `rm -rf "$HOME"`\nline', "7B", 3, 12, 1700000000.0)


@pytest.mark.parametrize(
    ("style", "body"),
    [
        ("feishu", {"msg_type": "text", "content": {"text": ALERT.text()}}),
        ("slack", {"text": ALERT.text()}),
        (
            "json",
            {
                "kind": "stuck",
                "message": ALERT.message,
                "job": "7B",
                "rank": 3,
                "step": 12,
                "time": 1700000000.0,
            },
        ),
    ],
    ids=["feishu", "slack", "json"],
)
def test_a_webhook_posts_json_in_the_readers_form(
    server: Server, style: str, body: dict[str, Any]
) -> None:
    Webhook(server.url, style=style).send(ALERT)
    assert server.bodies == [("/hook/s3cret-token", "application/json", body)]


def run_with(server: Server, caplog: pytest.LogCaptureFixture, timeout_s: float) -> float:
    """Train with a webhook and one alert; returns the seconds that the steps took."""
    webhook = Webhook(server.url, timeout_s=timeout_s)
    with caplog.at_level(logging.WARNING, "ilm_compile.monitor"):
        _, history = train(At(1, spoil_loss), Monitor(sinks=[webhook]), num_steps=1)
    assert len(history) == 1
    assert "s3cret" not in caplog.text + repr(webhook)
    return history[0].step_time_s


def test_a_webhook_that_refuses_is_logged_without_its_secret(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.status = 500
    run_with(server, caplog, 5.0)
    assert "an alert could not be sent: Webhook to 127.0.0.1: answered 500" in caplog.messages


def test_a_webhook_that_hangs_runs_out_of_time(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.delay_s = 0.5
    run_with(server, caplog, 0.1)
    assert "an alert could not be sent: Webhook to 127.0.0.1: TimeoutError" in caplog.messages


def test_a_webhook_that_nobody_answers_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    gone = Server()
    gone.server_close()
    run_with(gone, caplog, 5.0)
    assert any("Webhook to 127.0.0.1: ConnectionRefusedError" in m for m in caplog.messages)


def test_a_sink_that_takes_long_holds_nothing_up() -> None:
    ready = threading.Event()

    class Slow:
        def send(self, alert: Alert) -> None:
            ready.wait(5)

    dispatcher = Dispatcher([Slow()])
    start = time.monotonic()
    dispatcher.put(ALERT)
    dispatcher.close(timeout_s=0.05)
    assert time.monotonic() - start < 1
    ready.set()


def test_a_command_gets_the_alert_as_an_argument_no_shell_reads(tmp_path: Path) -> None:
    script = "import sys; open(sys.argv[1], 'w').write(sys.argv[2] + chr(0) + sys.stdin.read())"
    Command([sys.executable, "-c", script, str(tmp_path / "out")]).send(ALERT)
    text, standard_input = (tmp_path / "out").read_text().split("\0")
    assert text == ALERT.text()
    assert json.loads(standard_input)["message"] == ALERT.message


@pytest.mark.parametrize(
    ("code", "message"),
    [("import sys; sys.exit(3)", "exit status 3"), ("import time; time.sleep(9)", "longer than")],
    ids=["fails", "hangs"],
)
def test_a_command_that_fails_or_hangs_is_an_error(code: str, message: str) -> None:
    with pytest.raises(IlmCompileError, match=message):
        Command([sys.executable, "-c", code], timeout_s=1.0).send(ALERT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Webhook("file:///etc/passwd"), "https:// or http://, got one with scheme 'file'"),
        (lambda: Webhook("ftp://host/hook"), "got one with scheme 'ftp'"),
        (lambda: Webhook("https:///hook"), "got one with scheme 'https'"),
        (lambda: Webhook("https://host/x", style="teams"), "one of .'feishu', 'json', 'slack'."),
        (lambda: Command("rm -rf /"), "expected a list of program and arguments"),
        (lambda: Command([]), "expected a list of program and arguments"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(IlmCompileError, match=message):
        make()
