"""The checkpoint manager of a config, and where a run starts from."""

from __future__ import annotations

from ilm_compile.config import Config
from ilm_compile.config.schema import CHECKPOINT
from ilm_compile.convert import load_weights
from ilm_compile.runtime import Trainer
from ilm_compile.runtime.checkpoint import CheckpointManager
from ilm_compile.runtime.checkpoint.training_state import ALL
from ilm_compile.training.data import TrainBatches
from ilm_compile.training.model import build_model, weights_folder
from ilm_compile.training.settings import Settings, settings_of

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
        config=settings_of(config),
        every=options.every,
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        asynchronous=options.asynchronous,
        stop_file=options.stop_file,
    )


def start_from(config: Config, manager: CheckpointManager, trainer: Trainer) -> list[str]:
    """Put the run where it goes on; returns what was done, for people, in lines. Collective.

    The newest sound checkpoint of the run itself comes first; ckpt.load_path is for a run that
    has none yet. The first line says what was loaded, one more each setting that has changed since.
    Raises `CheckpointError` if the model has, other than in `ckpt.allow_change`.
    """
    options = config.ckpt
    if options.enabled and options.auto_resume:
        settings = Settings(config, trainer.parallel, content=(ALL,))
        step = manager.resume(settings="own", accept=settings.accept)
        if step is not None:
            return [f"resumed after step {step} from {checkpoint_folder(config)}", *settings.told]
    if options.load_path is None:
        weights = weights_folder(config)
        begins = f"seed {config.train.seed}" if weights is None else f"the weights in {weights}"
        return [f"a new run from {begins}"]
    return [f"started from {options.load_path}", *_load(config, manager, trainer)]


def _load(config: Config, manager: CheckpointManager, trainer: Trainer) -> list[str]:
    options = config.ckpt
    path = local_path(options.load_path or "")
    if options.load_format == CHECKPOINT:
        settings = Settings(config, trainer.parallel, content=options.load_content)
        manager.load(path, options.load_content, settings="own", accept=settings.accept)
        return settings.told
    allowed = options.allow_change
    load_weights(
        trainer.parallel, build_model(config), path, options.load_format, allow_change=allowed
    )
    return []


def local_path(path: str) -> str:
    """The path without the prefix that InternEvo gives local ones."""
    return path.removeprefix("local:")
