"""Train a small model on four processes and on one, and compare: the first thing to try.

Needs no GPU, no data and no other machine; takes about two minutes on four cores.
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --steps and --out."""
    parser.add_argument("--steps", type=int, help="of each of the two trainings")
    parser.add_argument("--out", type=Path, help="folder for metrics and the plot (runs/demo)")


def run(options: argparse.Namespace) -> None:
    """Run it; leaves with exit code 1 if the two trainings differ."""
    from ilm_compile.examples import demo

    given = {"--steps": options.steps, "--out": options.out}
    words = [f"{name}={value}" for name, value in given.items() if value is not None]
    if code := demo.main(words):
        sys.exit(code)
