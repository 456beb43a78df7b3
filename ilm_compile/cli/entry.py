"""Reads the command line, runs the command, and turns an error into one message and exit code 1."""

import argparse
import os
import sys
from collections.abc import Sequence

from ilm_compile.cli import (
    calibrate,
    convert,
    demo,
    diff,
    evaluate,
    explain,
    prepare_data,
    search,
    train,
    verify,
)
from ilm_compile.errors import IlmCompileError

COMMANDS = {
    "demo": demo,
    "plan": search,
    "calibrate": calibrate,
    "explain": explain,
    "verify": verify,
    "diff": diff,
    "train": train,
    "evaluate": evaluate,
    "prepare-data": prepare_data,
    "convert": convert,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; Python must not flush again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (IlmCompileError, OSError) as error:
        print(f"ilm-compile: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ilm-compile",
        description="Compile an ordinary PyTorch language model for parallel training.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = subparsers.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
