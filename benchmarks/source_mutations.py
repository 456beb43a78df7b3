"""Mutation testing of the runtime's source: every planted fault must fail a test that is named.

    python -m benchmarks.source_mutations [--only norm] [--processes 2]

Each mutant of `benchmarks/source_mutants.txt` is planted in a temporary copy of the
package, and its killers, test files in the order of their likelihood, are run there until one
fails. The test that failed must then pass on the unbroken copy, or it has killed nothing.
Exits with 1 if a mutant survives.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import RESULTS, THREADS, make_parser, save_json, show_table
from benchmarks.source_mutants import MUTANTS, SourceMutant

ROOT = Path(__file__).parents[1]
RUNNER = Path(__file__).with_name("source_runner.py")
COPIED = ("ilm_compile", "passes", "kernels", "tests", "pyproject.toml")
TIMEOUT_S = 300.0
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Fate:
    """killed_by: the test that failed; None for a survivor."""

    mutant: SourceMutant
    killed_by: str | None
    seconds: float


class Copy:
    """The package and its tests in a folder of their own, where faults are planted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._clock = int(time.time())
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
            else:
                shutil.copy(ROOT / name, folder / name)
        self._runner = subprocess.Popen(
            [sys.executable, str(RUNNER)],
            env={**os.environ, THREADS: "1", "COLUMNS": "200"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @contextmanager
    def planted(self, mutant: SourceMutant) -> Iterator[None]:
        """The fault is there until the block ends. Raises `ValueError` if it has no one place."""
        path = self.folder / mutant.file
        source = path.read_text()
        if (count := source.count(mutant.old)) != 1:
            raise ValueError(f"{mutant.file}: expected {mutant.old!r} once, found it {count} times")
        self._write(path, source.replace(mutant.old, mutant.new))
        try:
            yield
        finally:
            self._write(path, source)

    def failing(self, files: Sequence[str], *, timeout: float = TIMEOUT_S) -> str | None:
        """The first test that fails, None if all pass; tests that do not end have failed."""
        arguments = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
        request = {"folder": str(self.folder), "arguments": arguments, "timeout": timeout}
        assert self._runner.stdin is not None
        assert self._runner.stdout is not None
        self._runner.stdin.write(json.dumps(request) + "\n")
        self._runner.stdin.flush()
        answer = json.loads(self._runner.stdout.readline())
        if answer["status"] is None:
            return f"no end of {' '.join(files)} in {timeout:g} s"
        if answer["status"] == 0:
            return None
        found = FAILED.search(answer["output"])
        return found[1] if found else answer["output"].strip().splitlines()[-1]

    def close(self) -> None:
        """End the process that runs the tests."""
        assert self._runner.stdin is not None
        self._runner.stdin.close()
        self._runner.wait()

    def _write(self, path: Path, source: str) -> None:
        """Each time with another date, so that no compiled file of before is taken for it."""
        path.write_text(source)
        self._clock += 2
        os.utime(path, (self._clock, self._clock))


def judge(copy: Copy, mutant: SourceMutant, sound: set[str]) -> Fate:
    """Plant `mutant` and run its killers, one file after the other, until one fails.

    sound: the tests known to pass without a fault, which grows. Raises `RuntimeError` if the test
    that failed does so without any fault, too.
    """
    start = time.perf_counter()
    for file in dict.fromkeys(mutant.killers):
        with copy.planted(mutant):
            killed_by = copy.failing([file])
        if killed_by is None:
            continue
        test = killed_by if killed_by.startswith(file) else file
        if test not in sound and (found := copy.failing([test])) is not None:
            raise RuntimeError(f"{mutant.file}, {mutant.what}: {found} without any fault")
        sound.add(test)
        return Fate(mutant, killed_by, time.perf_counter() - start)
    return Fate(mutant, None, time.perf_counter() - start)


def judge_all(mutants: Sequence[SourceMutant], processes: int) -> Iterator[Fate]:
    """The fates in order. Raises `RuntimeError` if a killer fails without any fault."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(processes):
            copies.put(stack.enter_context(closing(Copy(folder / str(number)))))
        pool = stack.enter_context(ThreadPoolExecutor(processes))
        sound: set[str] = set()

        def borrowed(mutant: SourceMutant) -> Fate:
            copy = copies.get()
            try:
                return judge(copy, mutant, sound)
            finally:
                copies.put(copy)

        yield from pool.map(borrowed, mutants)


def show(fates: Sequence[Fate]) -> None:
    """Print a line per mutant."""
    survivors = sum(fate.killed_by is None for fate in fates)
    title = f"{len(fates)} source mutants of the runtime, {survivors} survive"
    lines = []
    for fate in fates:
        killer = (fate.killed_by or "SURVIVES").rpartition("/")[2]
        file = fate.mutant.file.removeprefix("ilm_compile/runtime/")
        lines.append((file, fate.mutant.what, killer, f"{fate.seconds:.0f}"))
    show_table(title, ("file", "fault", "killed by", "s"), lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("source_mutations", __doc__)
    parser.add_argument("--only", default="", help="only files whose name holds this")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.file]
    fates = []
    for fate in judge_all(mutants, options.processes):
        fates.append(fate)
        killer = fate.killed_by or "SURVIVES"
        print(f"{len(fates):3} {fate.mutant.file}: {fate.mutant.what}: {killer}", flush=True)
    show(fates)
    rows = [
        {
            "file": fate.mutant.file,
            "fault": fate.mutant.what,
            "killed_by": fate.killed_by,
            "seconds": round(fate.seconds, 1),
        }
        for fate in fates
    ]
    if not options.only:
        content = {"seconds": time.perf_counter() - start, "mutants": rows}
        save_json(RESULTS / "source_mutations.json", content)
    return int(any(fate.killed_by is None for fate in fates))


if __name__ == "__main__":
    sys.exit(main())
