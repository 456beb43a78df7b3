"""A checkpoint of an emulated world, kept in memory: cut by every rank, put together for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ilm_compile.program.layout import Place
from ilm_compile.runtime.checkpoint.boxes import Box
from ilm_compile.runtime.checkpoint.contents import Piece
from ilm_compile.runtime.checkpoint.manifest import Manifest, Record, Slice, check_tiling
from ilm_compile.runtime.checkpoint.mapped import mapped_groups
from ilm_compile.runtime.checkpoint.slices import TensorReader
from ilm_compile.runtime.checkpoint.training_state import MODEL, OPTIMIZER, TrainingState
from ilm_compile.runtime.parallel import Parallel
from ilm_compile.runtime.shard import Shard
from ilm_compile.runtime.trainer import Trainer

TRAINER = "trainer"
Part = tuple[list[Piece], list[list[str]]]  # the slices of a rank, the names in its param groups


class PieceReader(TensorReader):
    """Reads the slices of all ranks where a checkpoint would read files."""

    def __init__(self, manifest: Manifest, parts: Sequence[Part]) -> None:
        super().__init__(manifest)
        self._values: list[Tensor] = []
        for pieces, groups in parts:
            for piece in pieces:
                new = Record(piece.value.dtype, piece.shape, is_number=piece.is_number)
                record = manifest.tensors.setdefault(piece.name, new)
                record.slices.append(Slice("", str(len(self._values)), piece.box))
                self._values.append(piece.value)
            for group, names in zip(manifest.groups, groups, strict=True):
                group["params"] = list(dict.fromkeys([*group["params"], *names]))
        for name, record in manifest.tensors.items():
            check_tiling(record, f"emulation: checkpoint of {name}")

    def read_slice(self, record: Record, piece: Slice, box: Box) -> Tensor:
        return box.of(self._values[int(piece.key)])


def can_be_kept(parallel: Parallel) -> bool:
    """Whether the optimizer's state can be kept under the names of the user's model."""
    return all(group.moves_elements() for group in mapped_groups(parallel))


def take(trainer: Trainer) -> tuple[Part, Manifest]:
    """Return what a rank saves. Collective."""
    state = _state_of(trainer)
    pieces, groups = state.snapshot()
    return ([*pieces, *state.mapped()], groups), state.describe(trainer.num_steps, {})


def damage(trainer: Trainer) -> None:
    """Make everything that was saved unusable."""
    with torch.no_grad():
        for shard in trainer.parallel.parameters.shards.values():
            if shard.variable.is_parameter or shard.variable.persistent:
                _spoil(shard.local)
                _keep_padding(shard, trainer.parallel.mesh.place)
    trainer.optimizer.state.clear()


def put_back(trainer: Trainer, reader: PieceReader) -> None:
    """Load what all ranks have saved into one."""
    _state_of(trainer).put_back(reader, {MODEL, OPTIMIZER, TRAINER})


def _state_of(trainer: Trainer) -> TrainingState:
    return TrainingState(trainer.parallel, trainer.optimizer, {TRAINER: trainer})


def _keep_padding(shard: Shard, place: Place) -> None:
    """The rows that a padded vocabulary adds are zero, and in no checkpoint."""
    variable = shard.variable
    if variable.padding:
        own = variable.pad(torch.ones(variable.user_shape, dtype=torch.bool))
        shard.local.masked_fill_(~variable.layout.cut(own, place), 0)


def _spoil(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)
    else:
        tensor.zero_()
