"""Which process this is: read from torchrun's variables, or from Slurm's and put into those.

The rest of the package reads RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from ilm_compile.errors import PlanError

LAUNCHERS = ("torch", "slurm")
DEFAULT_PORT = 8888
_NODES = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
_SIZES = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those of the job. is_started: by a launcher, so that there are others."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    is_started: bool = False


def read_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that torchrun's variables give; a process of its own without them.

    Raises `PlanError` for variables that are missing or contradict each other.
    """
    if "WORLD_SIZE" not in environment:
        return Place()
    world_size = _number(environment, "WORLD_SIZE")
    place = Place(
        rank=_number(environment, "RANK"),
        local_rank=_number(environment, "LOCAL_RANK"),
        world_size=world_size,
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE", world_size)),
        is_started=True,
    )
    if not 0 <= place.local_rank <= place.rank < place.world_size:
        raise PlanError(
            f"launch: expected 0 <= LOCAL_RANK <= RANK < WORLD_SIZE, got {place.local_rank}, "
            f"{place.rank} and {place.world_size}; start the job with torchrun or srun"
        )
    return place


def launch_from_slurm(
    *,
    host: str | None = None,
    port: int | None = None,
    environment: MutableMapping[str, str] = os.environ,
) -> None:
    """Set torchrun's variables from those that srun gives each of its tasks.

    host: of rank 0, the first node of the job when None; port: a free one there, 8888 when None.
    Raises `PlanError` outside of srun.
    """
    size = next((name for name in _SIZES if name in environment), _SIZES[1])
    nodes = next((name for name in _NODES if name in environment), _NODES[0])
    values = {
        "RANK": _number(environment, "SLURM_PROCID", SRUN),
        "LOCAL_RANK": _number(environment, "SLURM_LOCALID", SRUN),
        "WORLD_SIZE": _number(environment, size, SRUN),
        "MASTER_PORT": DEFAULT_PORT if port is None else port,
    }
    environment.update({name: str(value) for name, value in values.items()})
    environment["LOCAL_WORLD_SIZE"] = _tasks_here(environment)
    environment["MASTER_ADDR"] = host or first_host(_text(environment, nodes, SRUN))


def launch_by_hand(
    *,
    world_size: int | None,
    rank: int | None,
    local_rank: int | None,
    host: str | None,
    port: int | None,
    environment: MutableMapping[str, str] = os.environ,
) -> None:
    """Set torchrun's variables from flags, for processes that nothing else started.

    Under torchrun flags may repeat what its variables say. Raises `PlanError` if they contradict
    it, or if a number is missing.
    """
    given = {"WORLD_SIZE": world_size, "RANK": rank, "LOCAL_RANK": local_rank}
    if "WORLD_SIZE" in environment:
        for name, value in given.items():
            if value is not None and str(value) != environment.get(name):
                raise PlanError(
                    f"launch: --{name.lower()} {value}, but {name}={environment.get(name)} in the "
                    "environment; leave the flag out under torchrun"
                )
        return
    missing = [name.lower() for name, value in given.items() if value is None]
    if missing:
        raise PlanError(
            f"launch: --{' and --'.join(missing)} missing: give --world_size, --rank and "
            "--local_rank, and --host and --port of rank 0, or start with torchrun"
        )
    environment.update({name: str(value) for name, value in given.items()})
    environment["MASTER_ADDR"] = host or "localhost"
    environment["MASTER_PORT"] = str(DEFAULT_PORT if port is None else port)


SRUN = "start the job with srun, or leave --launcher slurm out"


def first_host(nodes: str) -> str:
    """The first of a list of hosts in Slurm's form: ``node[003-006,9],other`` gives ``node003``."""
    match = re.fullmatch(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,]*))?(?:,.*)?", nodes)
    if match is None:
        raise PlanError(
            f"launch: expected a list of nodes such as node[01-04], got {nodes!r}; give --host"
        )
    return "".join(part or "" for part in match.groups())


def _tasks_here(environment: Mapping[str, str]) -> str:
    """How many tasks this node has: ``2(x3),1`` gives the number of each node in turn."""
    counts: list[str] = []
    for part in environment.get("SLURM_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [match[1]] * min(int(match[2] or 1), 1 << 20)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else environment["WORLD_SIZE"]


def _text(environment: Mapping[str, str], name: str, instead: str) -> str:
    if name not in environment:
        raise PlanError(f"launch: the variable {name} is not set; {instead}")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, instead: str = "start with torchrun") -> int:
    text = _text(environment, name, instead)
    if not text.isdecimal():
        raise PlanError(f"launch: expected a number in the variable {name}, got {text!r}")
    return int(text)
