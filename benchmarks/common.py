"""What the benchmarks share: processes, data, and the facts that make a figure repeatable."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ilm_compile import models
from ilm_compile.files import write_text
from ilm_compile.models.causal_lm import CausalLM

THREADS = "OMP_NUM_THREADS"
RESULTS = Path(__file__).parent / "results"
NUMBER = re.compile(r"\W*(\d|nan|inf|$)")  # what a cell that holds a number begins with
Row = TypeVar("Row")


def launch(function: Callable[..., Any], num_processes: int, *arguments: Any) -> list[Any]:
    """The results of `function(*arguments)` by rank, run in processes that torchrun's agent starts.

    function: a module-level function of an importable module. Each process computes on one thread,
    unless the environment sets OMP_NUM_THREADS. Raises torch's `ChildFailedError` if a rank fails.
    """
    os.environ.setdefault(THREADS, "1")
    config = launch_config(num_processes, start_method="spawn", monitor_interval=0.05)
    results = elastic_launch(config, _call)(function, arguments)
    return [results[rank] for rank in range(num_processes)]


def launch_config(
    num_processes: int, *, start_method: str, monitor_interval: float, max_restarts: int = 0
) -> LaunchConfig:
    """That of torchrun --standalone. monitor_interval: in seconds."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=monitor_interval,
        start_method=start_method,
    )


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(int(os.environ[THREADS]))
    return function(*arguments)


def make_model(preset: str, overrides: dict[str, Any], *, device: str = "meta") -> CausalLM:
    """The model of a preset of `ilm_compile.models`, with some config fields changed."""
    with torch.device(device):
        model: CausalLM = getattr(models, preset)(**overrides)
    return model


def random_batch(rows: int, seq_len: int, vocab_size: int, *, seed: int = 0) -> dict[str, Tensor]:
    """A global batch of random tokens, each row's labels being its next tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (rows, seq_len + 1), generator=generator)
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def circumstances() -> dict[str, Any]:
    """When, where and with what a figure was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", _main_module(), *sys.argv[1:]]),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads_per_process": int(os.environ.get(THREADS, "1")),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def make_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of the command `python -m benchmarks.NAME`, with its doc string as it stands."""
    return argparse.ArgumentParser(
        prog=f"benchmarks.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def make_console() -> Console:
    """A console for tables: as wide as the terminal, or wide enough where there is none."""
    return Console(width=None if sys.stdout.isatty() else 120)


def show_table(
    title: str | None,
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    sections: int = 0,
) -> None:
    """Print a table; a column of numbers keeps to the right, and one of text to the left.

    sections: how many rows belong together, of lines drawn between them; 0 for no lines.
    """
    cells = [[escape(str(cell)) for cell in row] for row in rows]
    table = Table(title=title)
    for place, heading in enumerate(headings):
        numbers = all(NUMBER.match(row[place]) for row in cells)
        table.add_column(heading, justify="right" if numbers else "left")
    for number, row in enumerate(cells, 1):
        table.add_row(*row, end_section=bool(sections) and number % sections == 0)
    make_console().print(table)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The lines of a table in Markdown, numbers from the second column on."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def dated(name: str) -> Path:
    """Where a benchmark with a result for every day writes that of today."""
    return RESULTS / f"{name}-{datetime.now(UTC).date().isoformat()}.json"


def last_line(error: Exception) -> str:
    """What an error of another process came to, without its traceback."""
    return [line for line in str(error).splitlines() if line.strip()][-1][:400]


def words_of(plan: Mapping[str, Any]) -> str:
    """Fields of a plan as a table has them: "tp=2 pp=4"."""
    return " ".join(f"{name}={value}" for name, value in plan.items())


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, which may hold dataclasses, with the circumstances it was measured under."""
    whole = {"circumstances": circumstances(), **content}
    write_text(path, json.dumps(whole, indent=2, default=asdict) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file with Unix line ends."""
    target = io.StringIO()
    csv.writer(target, lineterminator="\n").writerows([header, *rows])
    write_text(path, target.getvalue())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The "rows" that were saved there, none if nothing was: for a benchmark that goes on."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def keep_measuring(
    path: Path, rows: list[Row], found: Iterable[Row], name: Callable[[Row], str], **settings: Any
) -> None:
    """Add each row that is found to `rows`, tell it with its seconds, and save all with `settings`.

    What was measured before a run was stopped stays, and `read_rows` gives it to the next.
    """
    start = time.perf_counter()
    for row in found:
        seconds, start = time.perf_counter() - start, time.perf_counter()
        print(f"{name(row)}: {row} ({seconds:.0f} s)", flush=True)
        rows.append(row)
        save_json(path, {**settings, "rows": rows})


def _main_module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), "")


def _commit() -> str | None:
    """The commit of this checkout, with a + if files differ from it; None outside a checkout."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()
