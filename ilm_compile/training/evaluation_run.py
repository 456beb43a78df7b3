"""Evaluates a checkpoint of a run, outside of training, under any plan."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass

from ilm_compile.config import Config
from ilm_compile.runtime import Parallel
from ilm_compile.runtime.agree import broadcast
from ilm_compile.runtime.checkpoint import CheckpointError
from ilm_compile.runtime.checkpoint.agreement import together
from ilm_compile.runtime.checkpoint.manifest import Manifest
from ilm_compile.runtime.checkpoint.retention import step_name, step_of
from ilm_compile.runtime.checkpoint.slices import has_manifest, read_manifest
from ilm_compile.runtime.checkpoint.sound import check_files
from ilm_compile.runtime.checkpoint.storage import Storage, open_storage
from ilm_compile.runtime.checkpoint.training_state import MODEL, Loading, TrainingState
from ilm_compile.training.agreement import agree_on_start
from ilm_compile.training.checkpoints import checkpoint_folder
from ilm_compile.training.data import validation_sets
from ilm_compile.training.evaluation import evaluate_sets
from ilm_compile.training.model import initialize_model
from ilm_compile.training.preflight import StartError, check_evaluation
from ilm_compile.training.settings import Settings
from ilm_compile.training.trainer import set_torch_flags


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """checkpoint: its folder. step: after which it was saved. sets: metrics of each by name."""

    checkpoint: str
    step: int
    sets: dict[str, dict[str, float]]


def evaluate_run(config: Config, checkpoint: str | None = None) -> EvaluatedRun:
    """The metrics of every validation set of a config, the same on every rank.

    checkpoint: the folder or URL of one; None for the newest sound one of the run. Nothing is
    written, so the run may go on meanwhile. Under torchrun every rank calls it. Raises
    `StartError` before any process group is made if there is no checkpoint, no validation data or
    no room for the plan, and `CheckpointError` for a checkpoint that is damaged or of another
    model.
    """
    set_torch_flags(config)
    check_evaluation(config)
    storage, names = _candidates(config, checkpoint)
    sets = validation_sets(config)
    agree_on_start(config)
    parallel = initialize_model(config)
    manifest, name = _load(config, parallel, storage, names)
    return EvaluatedRun(f"{storage.url}/{name}", manifest.step, evaluate_sets(parallel, sets))


def _candidates(config: Config, checkpoint: str | None) -> tuple[Storage, list[str]]:
    """Where checkpoints lie, and the names of those to try, one after the other."""
    if checkpoint is not None:
        parent, _, name = checkpoint.rstrip("/").rpartition("/")
        storage = open_storage(parent or ".")
        if not has_manifest(storage, name):
            raise StartError(
                f"--checkpoint: expected the folder of a checkpoint, such as "
                f"{step_name(100)}, got {checkpoint}, which has no manifest.json"
            )
        return storage, [name]
    storage = open_storage(checkpoint_folder(config))
    steps = [step for name in storage.folders() if (step := step_of(name)) is not None]
    if not steps:
        raise StartError(
            f"{storage.url} holds no checkpoint of the run; train first, check job_name and "
            "ckpt.folder, or give --checkpoint"
        )
    return storage, [step_name(step) for step in sorted(steps, reverse=True)]


def _load(
    config: Config, parallel: Parallel, storage: Storage, names: list[str]
) -> tuple[Manifest, str]:
    """Load the weights of the first sound one; its manifest and name. Collective."""
    mesh, faults = parallel.mesh, list[str]()
    accept = Settings(config, parallel, content=(MODEL,)).accept
    # A training under way adds and deletes: ranks may have seen different ones.
    for name in json.loads(broadcast(json.dumps(names).encode(), mesh)):
        try:
            with together(mesh, "evaluate"):
                manifest = read_manifest(storage, name)
                check_files(storage, name, manifest, rank=mesh.rank, size=mesh.world_size)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults if mesh.rank == 0 else ():
            warnings.warn(f"a checkpoint is left out: {fault}", stacklevel=2)
        how = Loading(content=(MODEL,), accept=accept)
        TrainingState(parallel, None, {}).restore(storage, name, manifest, how)
        return manifest, name
    raise CheckpointError(f"{storage.url}: no sound checkpoint to evaluate: {'; '.join(faults)}")
