"""The checkpoint manager of a config, and where a run starts from."""

from __future__ import annotations

from ilm_compile.config import Config
from ilm_compile.config.schema import CHECKPOINT
from ilm_compile.convert import load_weights
from ilm_compile.runtime import Trainer
from ilm_compile.runtime.checkpoint import CheckpointManager
from ilm_compile.training.data import TrainBatches
from ilm_compile.training.model import build_model

CHECKPOINT_FOLDER = "checkpoints"
TRAINER, SAMPLER = "trainer", "sampler"


def checkpoint_folder(config: Config) -> str:
    """Where checkpoints go: ckpt.folder, or a folder in the run's."""
    return config.ckpt.folder or str(config.run_folder / CHECKPOINT_FOLDER)


def initialize_checkpoints(
    config: Config, trainer: Trainer, batches: TrainBatches
) -> CheckpointManager:
    """A manager of everything that training under this config goes on from."""
    options = config.ckpt
    return CheckpointManager(
        checkpoint_folder(config),
        trainer.parallel,
        optimizer=trainer.optimizer,
        states={TRAINER: trainer, SAMPLER: batches},
        config=config.to_dict(),
        every=options.every,
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        asynchronous=options.asynchronous,
        stop_file=options.stop_file,
    )


def start_from(config: Config, manager: CheckpointManager, trainer: Trainer) -> str:
    """Put the run where it goes on; returns what was loaded, for people. Collective.

    The newest complete checkpoint of the run itself comes first; ckpt.load_path is for a run that
    has none yet.
    """
    options = config.ckpt
    if options.enabled and options.auto_resume:
        step = manager.resume()
        if step is not None:
            return f"resumed after step {step} from {checkpoint_folder(config)}"
    if options.load_path is None:
        return f"a new run from seed {config.train.seed}"
    _load(config, manager, trainer)
    return f"started from {options.load_path}"


def _load(config: Config, manager: CheckpointManager, trainer: Trainer) -> None:
    options = config.ckpt
    path = local_path(options.load_path or "")
    if options.load_format == CHECKPOINT:
        manager.load(path, options.load_content)
    else:
        load_weights(trainer.parallel, build_model(config), path, options.load_format)


def local_path(path: str) -> str:
    """The path without the prefix that InternEvo gives local ones."""
    return path.removeprefix("local:")
