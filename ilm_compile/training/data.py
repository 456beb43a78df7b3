"""The data of a config: rows from files or from nowhere, and this rank's part of each batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ilm_compile.config import Config
from ilm_compile.convert.hf_files import read_config
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.batch import LocalBatch
from ilm_compile.runtime.data import (
    BatchIterator,
    BatchRamp,
    Conversations,
    DummyDataset,
    Part,
    RowDataset,
    TokenDataset,
    TokenShard,
    ValidationBatches,
    chat_of,
    documents_from_files,
    documents_from_pydoc,
    labels_in_place,
    load_tokenizer,
    open_shards,
    open_validation_shards,
    pack_documents,
)
from ilm_compile.runtime.data.tokenizer import BYTES
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.training.launch import read_place
from ilm_compile.training.model import input_spec, max_documents

DUMMY_ROWS = 100_000  # of random data
Batch = dict[str, Tensor]
Batches = Iterable[LocalBatch]


class TrainBatches:
    """Endless batches as `fit` makes them for the model; resumable like the iterator."""

    def __init__(self, batches: BatchIterator, fit: Callable[[Batch], LocalBatch]) -> None:
        self._batches = batches
        self._fit = fit

    def __iter__(self) -> Iterator[LocalBatch]:
        return self

    def __next__(self) -> LocalBatch:
        return self._fit(next(self._batches))

    def state_dict(self) -> dict[str, Any]:
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches.load_state_dict(state)

    def agree(self, mesh: Mesh) -> None:
        """See `BatchIterator.agree`. Collective."""
        self._batches.agree(mesh)


def get_train_data_loader(config: Config) -> TrainBatches:
    """The batches of training: of each this data-parallel rank's rows, and no others are read.

    Each is a `LocalBatch`, which `execute_schedule` and `fit` know as such. Raises
    `IlmCompileError` naming the folder or file that is missing or damaged.
    """
    part = data_parallel_part(config)
    data = config.data
    batches = BatchIterator(
        _train_rows(config),
        global_batch_size=global_batch_size(config),
        seed=_seed(config),
        ramp=BatchRamp.parse(data.rampup_batch_size, unit=data.rows * part.size),
        skip=data.skip_batches,
        num_workers=data.num_worker,
        part=part,
    )
    return TrainBatches(batches, _fit(config))


def get_validation_data_loaders(config: Config) -> dict[str, Batches]:
    """The batches of each validation set of a training by name; none if valid_every is 0."""
    return validation_sets(config) if config.data.valid_every else {}


def validation_sets(config: Config) -> dict[str, Batches]:
    """The batches of each validation set by name: each sub-folder of data.valid_folder is one."""
    folder = config.data.valid_folder
    if folder is None:
        return {}
    fit = _fit(config)
    return {
        name: _ValidBatches(_batches(config, rows), fit)
        for name, rows in _VALID[config.data.type](config, Path(folder)).items()
    }


def data_parallel_part(config: Config) -> Part:
    """This process among the ranks that the other axes leave, by the launcher's variables.

    As `Mesh` lays them out, which the first batch shows: it is compared between ranks.
    """
    plan, place = config.plan(), read_place()
    size = max(1, place.world_size // plan.ranks_per_replica)
    return Part(place.rank // (plan.ranks_per_replica // plan.pp) % size, size)


def global_batch_size(config: Config) -> int:
    """Rows of a step of all ranks."""
    return config.data.rows * config.data.micro_num * data_parallel_part(config).size


class _ValidBatches:
    def __init__(self, batches: ValidationBatches, fit: Callable[[Batch], LocalBatch]) -> None:
        self._batches = batches
        self._fit = fit

    def __iter__(self) -> Iterator[LocalBatch]:
        return map(self._fit, self._batches)


def _fit(config: Config) -> Callable[[Batch], LocalBatch]:
    """Leaves of a batch the inputs that the model takes, the labels where it expects them."""
    names, shifts = frozenset(input_spec(config)), config.hf_folder is not None

    def fit(batch: Batch) -> LocalBatch:
        taken = {name: value for name, value in batch.items() if name in names}
        return LocalBatch(labels_in_place(taken) if shifts else taken)

    return fit


def _batches(config: Config, rows: RowDataset) -> ValidationBatches:
    return ValidationBatches(
        rows,
        global_batch_size=global_batch_size(config),
        max_batches=config.data.valid_batches,
        part=data_parallel_part(config),
    )


def _seed(config: Config) -> int:
    return config.train.seed if config.data.seed is None else config.data.seed


def _train_rows(config: Config) -> RowDataset:
    data = config.data
    if data.type == "tokenized" and data.train_folder is None:
        return _random(config)
    return _TRAIN[data.type](config)


def _random(config: Config) -> RowDataset:
    return DummyDataset(
        num_rows=DUMMY_ROWS,
        seq_len=config.data.row_tokens,
        vocab_size=_vocab_size(config),
        max_documents=max_documents(config),
        seed=_seed(config),
        fixed_length=config.data.fixed_random_dataset_seqlen or not config.data.has_boundaries,
    )


def _tokenized(config: Config, shards: list[TokenShard], only: str | None = None) -> RowDataset:
    """The rows of token files. only: the name of the one type that they are of."""
    data = config.data
    return TokenDataset(
        shards,
        seq_len=data.row_tokens,
        max_document=data.seq_len if data.one_row else None,
        vocab_size=_vocab_size(config),
        packing=data.packing,
        max_documents=max_documents(config),
        long_documents=data.long_documents,
        min_length=data.min_length,
        min_length_by_type={
            name: length for name, length in data.min_length_dict.items() if only in (None, name)
        },
        shuffle_seed=_seed(config),
        zero_is_target=data.zero_is_target,
        learn_ends=data.learn_ends,
        rows_of_a_pack=data.micro_bsz,
    )


def _text(config: Config, documents: Iterable[str]) -> RowDataset:
    return pack_documents(
        documents,
        seq_len=config.data.row_tokens,
        max_documents=max_documents(config),
        tokenizer=load_tokenizer(config.tokenizer),
    )


def _chat(config: Config, paths: list[Path]) -> RowDataset:
    chat = chat_of(config.tokenizer)
    is_file = config.tokenizer != BYTES
    rows = Conversations(
        paths,
        tokenizer=load_tokenizer(config.tokenizer, end=chat.end if is_file else None),
        chat=chat,
        seq_len=config.data.row_tokens,
        vocab_size=_vocab_size(config),
        too_long=config.data.long_documents,
    )
    if read_place().rank == 0 and (rows.num_cut or rows.num_left_out):
        warnings.warn(
            f"data: of {len(rows) + rows.num_left_out} conversations {rows.num_cut} are cut after "
            f"{config.data.row_tokens} tokens, {rows.num_left_out} are left out, for there is no "
            "answer in these",
            stacklevel=2,
        )
    return rows


def _train_files(config: Config) -> list[Path]:
    return _files_below(Path(config.data.train_folder or ""))


def _files_below(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    if not files:
        raise IlmCompileError(f"data: expected files below {folder}, found none")
    return files


def _sets(
    config: Config, folder: Path, read: Callable[[Config, list[Path]], RowDataset]
) -> dict[str, RowDataset]:
    """A set for each sub-folder, and one for the files beside them."""
    sets: dict[str, list[Path]] = {}
    for path in _files_below(folder):
        parts = path.relative_to(folder).parts
        sets.setdefault(parts[0] if len(parts) > 1 else folder.name, []).append(path)
    return {name: read(config, paths) for name, paths in sets.items()}


def _text_files(config: Config, paths: list[Path]) -> RowDataset:
    documents = documents_from_files(
        paths,
        field=config.data.json_field,
        chat=chat_of(config.tokenizer),
        option="data.json_field",
    )
    return _text(config, documents)


def _vocab_size(config: Config) -> int:
    size = config.model.fields.get("vocab_size")
    if (folder := config.hf_folder) is not None:
        size = (read_config(Path(folder)) or {}).get("vocab_size")
    if not isinstance(size, int):
        raise IlmCompileError(
            f"model.vocab_size: data.type={config.data.type!r} needs it, and a model of type "
            f"{config.model.type!r} has no such key"
        )
    return size


_TRAIN: dict[str, Callable[[Config], RowDataset]] = {
    "tokenized": lambda config: _tokenized(config, open_shards(config.data.train_folder or "")),
    "text": lambda config: _text_files(config, _train_files(config)),
    "chat": lambda config: _chat(config, _train_files(config)),
    "pydoc": lambda config: _text(config, documents_from_pydoc()),
    "random": _random,
}
_VALID: dict[str, Callable[[Config, Path], dict[str, RowDataset]]] = {
    "tokenized": lambda config, folder: {
        name: _tokenized(config, shards, only=name)
        for name, shards in open_validation_shards(folder).items()
    },
    "text": partial(_sets, read=_text_files),
    "chat": partial(_sets, read=_chat),
}
