"""The blocks of a documentation page, and how each kind is run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.run import get_args_parser

from ilm_compile.cli import main

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w*)(?: title=\"([\w.]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KINDS = ("python", "text", "console", "toml")


@dataclass(frozen=True)
class Block:
    """kind: of `KINDS`. title: the file that it is."""

    kind: str
    title: str
    text: str


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in order; one of a kind that nobody runs is an error."""
    found = [Block(*match) for match in BLOCK.findall(page)]
    fences = len(re.findall(r"^```", page, re.MULTILINE))
    assert fences == 2 * len(found), "a fence that cannot be read"
    assert {block.kind for block in found} <= {*KINDS}, "a block that nobody runs"
    return found


def run_page(page: str, folder: Path, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the blocks in `folder`; return the namespace that they share, `namespace` if given.

    python: run, or written if it has a title; text: what the block before it must print; toml:
    written; console: checked, and a text after it is not looked at.
    """
    namespace = {"__name__": "page"} if namespace is None else namespace
    printed: str | None = None
    for block in blocks_of(page):
        if block.title:
            (folder / block.title).write_text(block.text)
        elif block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(block.text, "<page>", "exec"), namespace)
            printed = output.getvalue()
        elif block.kind == "text":
            assert printed is not None, f"nothing prints this:\n{block.text}"
            assert is_like(printed, block.text), f"expected:\n{block.text}\nprinted:\n{printed}"
            printed = None
        elif block.kind == "console":
            for line in block.text.splitlines():
                check_command(line, folder)
    return namespace


def is_like(printed: str, shown: str) -> bool:
    """Whether `shown` is what was printed, where ... stands for anything and blanks are alike."""
    words = [re.escape(word) for word in " ".join(shown.split()).split("...")]
    return re.fullmatch(".*?".join(words), " ".join(printed.split())) is not None


def check_command(line: str, folder: Path) -> None:
    """Raise AssertionError unless the command, its options and its files exist."""
    assert line.startswith("$ "), f"expected a command, got {line!r}"
    command, *arguments = shlex.split(line[2:])
    match command:
        case "ilm-compile":
            _check_ilm_compile(arguments)
        case "torchrun":
            options = get_args_parser().parse_args(arguments)
            if options.module:
                assert options.training_script == "ilm_compile.cli"
                _check_ilm_compile(options.training_script_args)
            else:
                assert (folder / options.training_script).is_file()
        case "make":
            assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
        case "python":
            assert arguments[0] == "-m"
            assert importlib.util.find_spec(arguments[1]) is not None
        case "pip":
            _check_extras(arguments)
        case _:
            raise AssertionError(f"{command} is no command that is checked")


def _check_ilm_compile(arguments: list[str]) -> None:
    """Parse them; --help that is added ends the command before it does anything."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as e:
        try:
            main([arguments[0], *arguments[1:], "--no-such-option"])
        except SystemExit:
            expected = "unrecognized arguments: --no-such-option"
            assert e.getvalue().strip().endswith(expected), e.getvalue()


def _check_extras(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert arguments[0] == "install"
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        assert {*extra.split(",")} <= {*project["optional-dependencies"]}
