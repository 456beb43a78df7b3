"""The data of a config: rows from files or from nowhere, and this rank's part of each batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ilm_compile.config import Config
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.batch import LocalBatch
from ilm_compile.runtime.data import (
    BatchIterator,
    BatchRamp,
    DummyDataset,
    Part,
    RowDataset,
    TokenDataset,
    TokenShard,
    ValidationBatches,
    chat_of,
    documents_from_files,
    documents_from_pydoc,
    load_tokenizer,
    open_shards,
    open_validation_shards,
    pack_documents,
)
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.training.launch import read_place
from ilm_compile.training.model import input_spec, max_documents

DUMMY_ROWS = 100_000  # of random data
Batches = Iterable[LocalBatch]


class TrainBatches:
    """Endless batches with the inputs that the model takes; resumable like the iterator."""

    def __init__(self, batches: BatchIterator, names: Iterable[str]) -> None:
        self._batches = batches
        self._names = frozenset(names)

    def __iter__(self) -> Iterator[LocalBatch]:
        return self

    def __next__(self) -> LocalBatch:
        return _inputs_of(next(self._batches), self._names)

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
    return TrainBatches(batches, input_spec(config))


def get_validation_data_loaders(config: Config) -> dict[str, Batches]:
    """The batches of each validation set of a training by name; none if valid_every is 0."""
    return validation_sets(config) if config.data.valid_every else {}


def validation_sets(config: Config) -> dict[str, Batches]:
    """The batches of each validation set by name: each sub-folder of data.valid_folder is one."""
    folder = config.data.valid_folder
    if folder is None:
        return {}
    names = input_spec(config)
    return {
        name: _ValidBatches(_batches(config, rows), names)
        for name, rows in _VALID[config.data.type](config, Path(folder)).items()
    }


def data_parallel_part(config: Config) -> Part:
    """This process among the ranks that tensor and pipeline leave, by the launcher's variables.

    As `Mesh` lays them out, which the first batch shows: it is compared between ranks.
    """
    parallel, place = config.parallel, read_place()
    size = max(1, place.world_size // (parallel.tensor * parallel.pipeline))
    return Part(place.rank // parallel.tensor % size, size)


def global_batch_size(config: Config) -> int:
    """Rows of a step of all ranks."""
    return config.data.rows * config.data.micro_num * data_parallel_part(config).size


class _ValidBatches:
    def __init__(self, batches: ValidationBatches, names: Iterable[str]) -> None:
        self._batches = batches
        self._names = frozenset(names)

    def __iter__(self) -> Iterator[LocalBatch]:
        return (_inputs_of(batch, self._names) for batch in self._batches)


def _inputs_of(batch: Mapping[str, Tensor], names: Collection[str]) -> LocalBatch:
    return LocalBatch({name: value for name, value in batch.items() if name in names})


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
        fixed_length=config.data.fixed_random_dataset_seqlen or config.data.packing == "window",
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
        tokenizer=load_tokenizer(config.data.tokenizer),
    )


def _files_below(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    if not files:
        raise IlmCompileError(f"data: expected text files below {folder}, found none")
    return files


def _text_sets(config: Config, folder: Path) -> dict[str, RowDataset]:
    sets: dict[str, list[Path]] = {}
    for path in _files_below(folder):
        parts = path.relative_to(folder).parts
        sets.setdefault(parts[0] if len(parts) > 1 else folder.name, []).append(path)
    return {name: _text(config, _documents(config, paths)) for name, paths in sets.items()}


def _documents(config: Config, paths: list[Path]) -> list[str]:
    return documents_from_files(paths, chat=chat_of(config.data.tokenizer))


def _vocab_size(config: Config) -> int:
    size = config.model.fields.get("vocab_size")
    if not isinstance(size, int):
        raise IlmCompileError(
            f"model.vocab_size: data.type={config.data.type!r} needs it, and a model of type "
            f"{config.model.type!r} has no such key"
        )
    return size


_TRAIN: dict[str, Callable[[Config], RowDataset]] = {
    "tokenized": lambda config: _tokenized(config, open_shards(config.data.train_folder or "")),
    "text": lambda config: _text(
        config, _documents(config, _files_below(Path(config.data.train_folder or "")))
    ),
    "pydoc": lambda config: _text(config, documents_from_pydoc()),
    "random": _random,
}
_VALID: dict[str, Callable[[Config, Path], dict[str, RowDataset]]] = {
    "tokenized": lambda config, folder: {
        name: _tokenized(config, shards, only=name)
        for name, shards in open_validation_shards(folder).items()
    },
    "text": _text_sets,
}
