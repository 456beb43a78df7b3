"""InternEvo's `internlm.train`: the model, its optimizer and its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ilm_compile import training
from ilm_compile.errors import IlmCompileError
from ilm_compile.internevo.job import get_config
from ilm_compile.runtime import Parallel
from ilm_compile.runtime.data import open_shards
from ilm_compile.training.data import TrainBatches
from ilm_compile.training.optimizer import Optimization


def initialize_model(
    pre_process_func: Callable[[], Any] | None = None,
    post_process_func: Callable[[Any], Any] | None = None,
) -> Parallel:
    """This rank's part of the model that the config asks for.

    pre_process_func is called before it is built, post_process_func after, with what the first
    returned.
    """
    before = None if pre_process_func is None else pre_process_func()
    model = training.initialize_model(get_config())
    if post_process_func is not None:
        post_process_func(before)
    return model


def initialize_optimizer(model: Parallel) -> Optimization:
    """(optimizer, beta2_scheduler, lr_scheduler) of the model."""
    return training.initialize_optimizer(get_config(), model)


def get_train_data_loader(
    num_worker: int | None = None,
    dataset_generate_func: None = None,
    train_sampler: None = None,
    train_collate_fn: None = None,
) -> tuple[TrainBatches, list[str]]:
    """The global batches of training, and the names of the types of its token files.

    num_worker: processes that read ahead, over data.num_worker. Raises `IlmCompileError` for one of
    the functions of InternEvo's own data sets.
    """
    functions = {
        "dataset_generate_func": dataset_generate_func,
        "train_sampler": train_sampler,
        "train_collate_fn": train_collate_fn,
    }
    for name, function in functions.items():
        if function is not None:
            raise IlmCompileError(
                f"get_train_data_loader: {name} is for InternEvo's data sets: leave it out, or "
                "give batches of your own to the Trainer, a dict of tensors each"
            )
    config = get_config()
    if num_worker is not None:
        config = replace(config, data=replace(config.data, num_worker=num_worker))
    return training.get_train_data_loader(config), _type_names()


def _type_names() -> list[str]:
    data = get_config().data
    if data.type != "tokenized" or data.train_folder is None:
        return []
    return sorted({shard.type_name for shard in open_shards(data.train_folder)})


def build_train_loader_with_data_type() -> tuple[TrainBatches, list[str]]:
    """`get_train_data_loader`, under the name that InternEvo gave it in 2024."""
    return get_train_data_loader()
