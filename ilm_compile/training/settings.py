"""The settings that a checkpoint was made with, beside those of the config that goes on from it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ilm_compile.config import Config
from ilm_compile.config.changes import Change, model_changes, training_changes
from ilm_compile.convert.hf_files import read_config
from ilm_compile.convert.hf_model import model_facts
from ilm_compile.program.layout import AXES
from ilm_compile.runtime import Parallel
from ilm_compile.runtime.checkpoint import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import Manifest
from ilm_compile.runtime.checkpoint.training_state import ALL, MODEL

TRAINED = {ALL, "optimizer", "trainer"}  # what makes it the same training that goes on


def settings_of(config: Config) -> dict[str, Any]:
    """`Config.to_dict`, and what the config.json of model.hf says, as a checkpoint keeps it."""
    values = config.to_dict()
    if config.hf_folder is not None:
        values["model"] |= model_facts(read_config(Path(config.hf_folder)) or {})
    return values


class Settings:
    """Refuses a checkpoint of another model and notes what else has changed.

    content: what is loaded of it. told: a line for each change, once `accept` was called.
    """

    def __init__(self, config: Config, parallel: Parallel, *, content: Collection[str]) -> None:
        self.told: list[str] = []
        self._config = config
        self._own = settings_of(config)
        self._data_parallel = parallel.mesh.dp.size
        self._content = set(content)

    def accept(self, manifest: Manifest) -> None:
        """Raise `CheckpointError` naming each key of the model that must not change and has."""
        changes = list[Change]()
        if self._content & {ALL, MODEL}:
            changes += model_changes(manifest.config, self._own)
        refused = [c for c in changes if c.key not in self._config.ckpt.allow_change]
        if refused:
            allow = ", ".join(repr(change.key) for change in refused)
            raise CheckpointError(
                f"the checkpoint of step {manifest.step} is of another model (its value -> the "
                f"config's): {'; '.join(map(str, refused))}; write its values into [model], or "
                f"allow the change by ckpt.allow_change = [{allow}]"
            )
        if self._content & TRAINED:
            changes += training_changes(manifest.config, self._own)
            changes += self._rows(manifest)
        self.told = [f"changed: {change}" for change in changes]

    def _rows(self, manifest: Manifest) -> Iterator[Change]:
        """The rows of a step, where another number of ranks changes them."""
        plan = manifest.plan
        before = max(1, manifest.world_size // prod(plan.get(axis, 1) for axis in ("pp", *AXES)))
        if before != self._data_parallel and "data" in manifest.config:
            old = _rows(manifest.config["data"], before)
            new = _rows(self._own["data"], self._data_parallel)
            if old != new:
                yield Change("rows of a step", old, new)


def _rows(data: Mapping[str, Any], data_parallel: int) -> int:
    return int(data["micro_bsz"]) * int(data["micro_num"]) * data_parallel
