"""Whether all ranks were started with the same config, code and versions."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ilm_compile.config import Config
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.alike import differences
from ilm_compile.runtime.mesh import choose_device, join_job
from ilm_compile.training.launch import read_place
from ilm_compile.training.settings import settings_of


def agree_on_start(config: Config, *, on_met: Callable[[], object] | None = None) -> None:
    """Join the job's process group and compare hashes, the first collective of all.

    on_met: called once all ranks are known to have come, unless the group was there already.
    A rank with another plan would wait in another group; here it is named. Raises
    `IlmCompileError` on all ranks with the numbers of those that differ from rank 0, and in what.
    Does nothing in a process that was started alone.
    """
    if not dist.is_initialized():
        if not read_place().is_started:
            return
        timeout = timedelta(seconds=config.train.timeout_s)
        join_job(choose_device(), timeout=timeout, on_met=on_met)
    # The code first, for another code may have other keys.
    for what, facts in (("code", code_facts()), ("config", config_facts(config))):
        if found := differences(facts, choose_device()):
            raise IlmCompileError(
                f"start: expected the same {what} on all ranks, {'; '.join(found)}; start "
                "every node with the same files, flags and packages"
            )


def code_facts() -> dict[str, bytes]:
    """What runs on this rank, by name."""
    return {
        "the sources of ilm_compile": code_digest(),
        "the version of torch": torch.__version__.encode(),
        "the version of Python": platform.python_version().encode(),
    }


def config_facts(config: Config) -> dict[str, bytes]:
    """Every value of the config by its key; the keys of the model, which depend on it, as one."""
    return {key: repr(value).encode() for key, value in _keys(settings_of(config))}


def _keys(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, value in values.items():
        if isinstance(value, Mapping) and section != "model":
            yield from ((f"{section}.{key}", each) for key, each in value.items())
        else:
            yield section, value


@cache
def code_digest() -> bytes:
    """A hash of the package's source files."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in (root, root / "passes", root / "kernels"):  # links are not followed by rglob
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.digest()
