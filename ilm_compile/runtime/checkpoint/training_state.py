"""Everything of a run that a checkpoint holds: what to write of it, and how to put it back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch.optim import Optimizer

from ilm_compile.runtime.checkpoint import restore
from ilm_compile.runtime.checkpoint.agreement import together
from ilm_compile.runtime.checkpoint.contents import (
    Piece,
    Stateful,
    group_names,
    group_options,
    mapped_pieces,
    model_pieces,
    optimizer_pieces,
    plain_states,
    random_pieces,
)
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import Manifest
from ilm_compile.runtime.checkpoint.slices import SliceReader, TensorReader
from ilm_compile.runtime.checkpoint.storage import Storage
from ilm_compile.runtime.parallel import Parallel

MODEL, OPTIMIZER, RANDOM, ALL = "model", "optimizer", "random", "all"
Settings = Literal["saved", "own"]


def anything(manifest: Manifest) -> None:
    """Accept every checkpoint."""


@dataclass(frozen=True, slots=True)
class Loading:
    """What to load and how: see `CheckpointManager.load`."""

    content: Iterable[str] = (ALL,)
    settings: Settings = "saved"
    accept: Callable[[Manifest], None] = anything


@dataclass(frozen=True, slots=True)
class TrainingState:
    """A model, its optimizer if any, and objects with plain states by name."""

    parallel: Parallel
    optimizer: Optimizer | None
    states: Mapping[str, Stateful]

    def __post_init__(self) -> None:
        if taken := sorted(set(self.states) & {MODEL, OPTIMIZER, RANDOM, ALL}):
            raise CheckpointError(f"checkpoints: {taken} cannot be names of states; they are taken")

    @property
    def parts(self) -> list[str]:
        """The names of what there is, as in `CheckpointManager.load`'s content."""
        optimizer = [] if self.optimizer is None else [OPTIMIZER]
        return [MODEL, *optimizer, RANDOM, *self.states]

    def mapped(self) -> list[Piece]:
        """The part of a snapshot that ranks have to make together. Collective."""
        return list(mapped_pieces(self.parallel, self.optimizer))

    def snapshot(self) -> tuple[list[Piece], list[list[str]]]:
        """Host copies of this rank's slices, and the names in its param groups."""
        mesh = self.parallel.mesh
        pieces = [*model_pieces(self.parallel), *random_pieces(mesh.rank, mesh.device)]
        if self.optimizer is None:
            return pieces, []
        pieces += optimizer_pieces(self.parallel, self.optimizer)
        return pieces, group_names(self.parallel, self.optimizer)

    def describe(self, step: int, config: Mapping[str, Any]) -> Manifest:
        """A manifest that holds all but files and tensors."""
        options = [] if self.optimizer is None else group_options(self.optimizer)
        return Manifest(
            step=step,
            num_steps=self.parallel.num_steps,
            world_size=self.parallel.mesh.world_size,
            plan=json.loads(json.dumps(asdict(self.parallel.plan))),
            config=dict(config),
            states=plain_states(self.states),
            groups=[{**group, "params": []} for group in options],
            parts=self.parts,
        )

    def restore(self, storage: Storage, name: str, manifest: Manifest, how: Loading) -> None:
        """Load what `how` says. Collective; raises `CheckpointError` on all ranks alike.

        Everything that can be known from the manifest is checked before anything is changed.
        """
        mesh, where = self.parallel.mesh, f"{storage.url}/{name}"
        content = set(how.content)
        with together(mesh, "load"):
            how.accept(manifest)
            wanted = self._wanted(manifest, content, where)
            if MODEL in wanted:
                restore.check_model(manifest, self.parallel, where)
            if OPTIMIZER in wanted and self.optimizer is not None:
                restore.check_groups(manifest, self.parallel, self.optimizer, where)
                self._tell_options(manifest, how)
        with (
            together(mesh, "load"),
            SliceReader(storage, name, manifest, place=mesh.rank, places=mesh.world_size) as reader,
        ):
            self.put_back(reader, wanted, options=how.settings == "saved")

    def put_back(
        self, reader: TensorReader, parts: Collection[str], *, options: bool = True
    ) -> None:
        """Overwrite these parts by what `reader` gives, which was checked.

        options: the numbers of the optimizer's param groups too.
        """
        if MODEL in parts:
            restore.restore_model(reader, self.parallel)
        if OPTIMIZER in parts and self.optimizer is not None:
            restore.restore_optimizer(reader, self.parallel, self.optimizer, options=options)
        for key, holder in self.states.items():
            if key in parts:
                holder.load_state_dict(reader.manifest.states[key])
        if RANDOM in parts:
            self.parallel.num_steps = reader.manifest.num_steps
            restore.restore_random(reader, self.parallel)

    def _tell_options(self, manifest: Manifest, how: Loading) -> None:
        assert self.optimizer is not None
        changed = restore.changed_options(manifest, self.optimizer)
        if changed and how.settings == "saved" and self.parallel.mesh.rank == 0:
            warnings.warn(
                f"checkpoint of step {manifest.step}: the optimizer goes on with the numbers it "
                f"was saved with, not its own (saved -> own): {', '.join(changed)}; to go on with "
                "its own, load with settings='own'",
                stacklevel=4,
            )

    def _wanted(self, manifest: Manifest, content: set[str], where: str) -> set[str]:
        own = set(self.parts)
        wanted = own if ALL in content else content
        if unknown := sorted(wanted - own):
            raise CheckpointError(f"expected content of {sorted(own)} or all, got {unknown}")
        if missing := sorted(wanted - set(manifest.parts)):
            raise CheckpointError(
                f"{where}: holds no {', '.join(missing)}, only {', '.join(manifest.parts)}; leave "
                "out of the content what shall start anew"
            )
        return wanted
