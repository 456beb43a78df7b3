"""The model of a config, on the meta device and in parallel."""

from __future__ import annotations

import inspect
from collections.abc import Container
from copy import deepcopy
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilm_compile.config import Config
from ilm_compile.convert import load_weights
from ilm_compile.errors import IlmCompileError
from ilm_compile.models import MODEL_INITIALIZER
from ilm_compile.partitioning import make_plan, parallelize
from ilm_compile.program.trace import ExampleInputs, LossFn
from ilm_compile.runtime import Parallel
from ilm_compile.runtime.data import IGNORED_LABEL

MIN_DOCUMENTS = 8
TOKENS_A_DOCUMENT = 64


def initialize_model(config: Config) -> Parallel:
    """This rank's part of the model that the config asks for, ready to train.

    Joins the process group of the job and makes the groups by kind; see `ParallelMode`. Raises
    `PlanError` if the plan does not fit the model or the world.
    """
    model = build_model(config)
    parallel = parallelize(
        model,
        plan=make_plan(config.plan()),
        example_inputs=input_spec(config),
        loss_fn=loss_function(config),
        timeout=timedelta(seconds=config.train.timeout_s),
    )
    if (folder := weights_folder(config)) is not None:
        load_weights(parallel, model, folder, "hf")
    return parallel


def weights_folder(config: Config) -> str | None:
    """The Hugging Face folder whose weights a new run starts from, None if there is none."""
    return None if config.model.fields.get("from_seed") else config.hf_folder


def build_model(config: Config) -> nn.Module:
    """The whole model on the meta device, from `MODEL_INITIALIZER`."""
    builder = MODEL_INITIALIZER.get_module(config.model.type)
    with torch.device("meta"):
        return builder(**config.model_fields())


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The list of modules that holds most of the parameters; empty if there is none."""
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    return max(lists, key=_elements, default=nn.ModuleList())


def only_block(model: nn.Module) -> nn.Module | None:
    """A copy of the model with the middle one of its blocks alone, None if it has none.

    The middle one: first and last blocks are often of their own kind.
    """
    if not blocks_of(model):
        return None
    copied = deepcopy(model)
    blocks = blocks_of(copied)
    middle = len(blocks) // 2
    del blocks[middle + 1 :], blocks[:middle]
    return copied


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def max_documents(config: Config) -> int:
    """Documents in one row at most: as many boundaries the program is compiled for."""
    data = config.data
    if not data.has_boundaries:
        return 1
    documents = data.max_documents or max(MIN_DOCUMENTS, data.row_tokens // TOKENS_A_DOCUMENT)
    return documents + data.micro_bsz if data.one_row else documents  # cut ones count again


def input_spec(config: Config) -> ExampleInputs:
    """Shape and dtype of each input of one micro-batch, by name.

    Those that the data offer and the model's forward takes. Rows of one text have no boundaries, so
    positions and boundaries are left out there.
    """
    rows = (config.data.rows, config.data.row_tokens)
    spec = {"input_ids": (rows, torch.int64), "labels": (rows, torch.int64)}
    if config.data.has_boundaries:
        borders = (config.data.rows, max_documents(config) + 1)
        spec |= {"position_ids": (rows, torch.int64), "cu_seqlens": (borders, torch.int32)}
    with torch.device("meta"):
        arguments = inspect.signature(build_model(config).forward).parameters
    if config.hf_folder is not None and config.data.has_boundaries:
        _check_positions(config, arguments)
    taken = {name: value for name, value in spec.items() if name in arguments or name == "labels"}
    if "input_ids" not in taken or ("labels" not in arguments and not loss_function(config)):
        raise IlmCompileError(
            f"model.type={config.model.type!r}: expected a model whose forward takes input_ids and "
            f"labels, it takes {', '.join(arguments)}; call parallelize with a loss_fn instead"
        )
    return taken


def _check_positions(config: Config, arguments: Container[str]) -> None:
    """A Hugging Face model learns from its positions where the documents of a row begin."""
    if "position_ids" not in arguments:
        raise IlmCompileError(
            f"model.hf: {config.hf_folder} is a model that takes no position_ids, so it would read "
            "on from one document of a row into the next; write data.packing = 'window' if it may"
        )


def loss_function(config: Config) -> LossFn | None:
    """The loss to trace in place of the model's own, None where that will do."""
    smoothing = config.loss.label_smoothing
    return partial(_smoothed_loss, smoothing=smoothing) if smoothing else None


def _smoothed_loss(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    """Cross entropy against (1 - smoothing) of the target and the rest spread over all tokens.

    Szegedy et al., arXiv 1512.00567, section 7. logits: (batch, seq, vocab).
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED_LABEL,
        label_smoothing=smoothing,
    )
