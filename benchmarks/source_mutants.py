"""The source mutants of `source_mutants.txt`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")
MUTANT = re.compile(r"(.+?)(?: \[(\w+)\])?\n((?:- .+\n)+)((?:\+ .+\n)*)")


@dataclass(frozen=True, slots=True)
class SourceMutant:
    """`old` becomes `new` in `file`. killers: test files, the likeliest first."""

    file: str
    what: str
    old: str
    new: str
    killers: tuple[str, ...]


def read_mutants(text: str) -> list[SourceMutant]:
    """The mutants in the order of the text. Raises `ValueError` for a line that is none's."""
    found = []
    for section in re.split(r"^@ ", text, flags=re.MULTILINE)[1:]:
        head, _, rows = section.partition("\n")
        file, _, tests = head.partition(": ")
        if rest := MUTANT.sub("", rows).strip():
            raise ValueError(f"{file}: expected a name and the lines of a diff, got {rest!r}")
        for what, first, old, new in MUTANT.findall(rows):
            killers = dict.fromkeys(test_file(test) for test in (first, *tests.split()) if test)
            path = f"ilm_compile/runtime/{file}"
            found.append(SourceMutant(path, what, _text(old), _text(new), tuple(killers)))
    return found


def test_file(name: str) -> str:
    """The path of a test file of the runtime."""
    return f"tests/runtime/test_{name}.py"


def _text(lines: str) -> str:
    return "\n".join(line[2:] for line in lines.splitlines())


MUTANTS = read_mutants(FILE.read_text())
