"""The command line of a training, which a user's own script may extend."""

from __future__ import annotations

import argparse
from pathlib import Path

from ilm_compile.config import Config, load_config
from ilm_compile.errors import IlmCompileError
from ilm_compile.training.launch import LAUNCHERS, launch_from_slurm


def get_default_parser() -> argparse.ArgumentParser:
    """A parser with the flags of a training; add your own, then `config_from_arguments`.

    parser = ilm_compile.get_default_parser()
    parser.add_argument("--note")
    options = parser.parse_args()
    config = ilm_compile.config_from_arguments(options)
    """
    parser = argparse.ArgumentParser(description="Train a language model in parallel.")
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those flags to a parser."""
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help=".toml, or .py of InternEvo"
    )
    parser.add_argument(
        "--config-root",
        type=Path,
        metavar="FOLDER",
        help="of which a .py config may import others; its own folder",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="over the file, as in --set parallel.tensor=4; may be repeated",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same as --set train.seed=N")
    parser.add_argument(
        "--profiling", action="store_true", help="the same as --set profiler.enabled=true"
    )
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="torch", help="what started it; torch: torchrun"
    )
    parser.add_argument("--host", help="of rank 0, under --launcher slurm; the first node")
    parser.add_argument("--port", type=int, help="there, under --launcher slurm; 8888")


def config_from_arguments(options: argparse.Namespace) -> Config:
    """The config that the flags name, after reading the launcher's variables.

    Raises `ConfigError` for the config, `PlanError` for the variables, `IlmCompileError` for flags
    that would have no effect.
    """
    if options.launcher == "slurm":
        launch_from_slurm(host=options.host, port=options.port)
    elif options.host is not None or options.port is not None:
        raise IlmCompileError(
            "--host and --port are for --launcher slurm; give torchrun --master-addr and "
            "--master-port instead"
        )
    overrides = list(options.set)
    if options.seed is not None:
        overrides.append(f"train.seed={options.seed}")
    if options.profiling:
        overrides.append("profiler.enabled=true")
    return load_config(options.config, overrides, root=options.config_root)
