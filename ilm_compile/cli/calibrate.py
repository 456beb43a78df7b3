"""Measure this machine in under a minute, and write it as a file that plan and search take.

ilm-compile calibrate --output machine.toml; ilm-compile plan MODEL --hardware machine.toml ...
"""

import argparse
from pathlib import Path

import torch

from ilm_compile.automatic import hardware_of
from ilm_compile.files import write_text
from ilm_compile.planner.calibrate import calibrate
from ilm_compile.planner.rates import SECONDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--output", type=Path, default=Path("machine.toml"), metavar="FILE")
    parser.add_argument("--base", help="the known machine to begin from; else the one found here")
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="that exchange messages here (2)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help=f"for each try ({SECONDS})"
    )


def run(options: argparse.Namespace) -> None:
    """Measure, print and write."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = options.base or hardware_of(device)
    text = calibrate(
        options.output.stem, base, device, num_processes=options.processes, seconds=options.seconds
    )
    print(text, end="")
    write_text(options.output, text)
    print(f"{options.output} is written")
