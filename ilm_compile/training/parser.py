"""The command line of a training, which a user's own script may extend."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ilm_compile.config import Config, load_config
from ilm_compile.errors import IlmCompileError
from ilm_compile.training.launch import LAUNCHERS, launch_by_hand, launch_from_slurm

_BY_HAND = {"--world_size": "world_size", "--rank": "rank", "--local_rank": "local_rank"}
_DEVICES = {"nccl": "GPUs", "gloo": "the CPU"}


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
    add_config_arguments(parser)
    parser.add_argument(
        "--profiling", action="store_true", help="the same as --set profiler.enabled=true"
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those that say which config it is and which process this is."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=".toml, or .py of InternEvo; needed"
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
        "--launcher", choices=LAUNCHERS, default="torch", help="what started it; torch: torchrun"
    )
    parser.add_argument("--host", help="of rank 0, under slurm or with --rank; the first node")
    parser.add_argument("--port", type=int, help="there, under slurm or with --rank; 8888")
    by_hand = "of this process, where neither torchrun nor srun started it"
    for flag, dest in _BY_HAND.items():
        parser.add_argument(flag, type=int, dest=dest, metavar="N", help=by_hand)
    parser.add_argument(
        "--backend", choices=tuple(_DEVICES), help="refused if it is not that of the device"
    )


def config_from_arguments(options: argparse.Namespace) -> Config:
    """The config that the flags name, after reading the launcher's variables.

    Raises `ConfigError` for the config, `PlanError` for the variables, `IlmCompileError` for flags
    that would have no effect.
    """
    if options.config is None:
        raise IlmCompileError("--config FILE is missing: a .toml file, or a .py file of InternEvo")
    _launch(options)
    _check_backend(options.backend)
    overrides = list(options.set)
    if options.seed is not None:
        overrides.append(f"train.seed={options.seed}")
    if getattr(options, "profiling", False):
        overrides.append("profiler.enabled=true")
    return load_config(options.config, overrides, root=options.config_root)


def _launch(options: argparse.Namespace) -> None:
    """Say which process this is, if torchrun's variables do not yet."""
    numbers = {name: getattr(options, name) for name in _BY_HAND.values()}
    has_numbers = any(number is not None for number in numbers.values())
    if options.launcher == "slurm":
        if has_numbers:
            raise IlmCompileError(
                f"{', '.join(_BY_HAND)}: srun gives them; leave them or --launcher slurm out"
            )
        launch_from_slurm(host=options.host, port=options.port)
    elif has_numbers:
        launch_by_hand(**numbers, host=options.host, port=options.port)
    elif options.host is not None or options.port is not None:
        raise IlmCompileError(
            "--host and --port are for --launcher slurm and --rank; give torchrun --master-addr "
            "and --master-port instead"
        )


def _check_backend(name: str | None) -> None:
    found = "nccl" if torch.cuda.is_available() else "gloo"
    if name not in (None, found):
        raise IlmCompileError(
            f"--backend {name} is for {_DEVICES[str(name)]}, this process runs on "
            f"{_DEVICES[found]} with {found}; leave it out"
        )
