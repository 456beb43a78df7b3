"""What several keys of a config must satisfy together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ilm_compile.config.config import Config
from ilm_compile.config.schema import CHECKPOINT, DataOptions
from ilm_compile.config.table import Place, Problems, Table
from ilm_compile.errors import PlanError
from ilm_compile.models import DECODERS

Fault = tuple[str, str]  # the key that is best changed, and what is wrong
BYTE_VOCABULARY = 258
_WITHOUT_FOLDER = ("pydoc", "random")
_OF_PACKED_ROWS = (
    *("packing", "max_documents", "min_length", "min_length_dict", "zero_is_target"),
    *("learn_ends", "fixed_random_dataset_seqlen"),
)


def check_together(config: Config, table: Table, place: Place) -> Config:
    """The config with what is worth a notice. Raises `ConfigError` with all that contradicts."""
    problems = Problems()
    for check in _CHECKS:
        for key, message in check(config):
            found = table.find(key)
            problems.add(found[1] if found else place, f"{key}: {message}")
    problems.raise_if_any()
    notices = [f"{place}: {message}" for message in _notices(config)]
    return replace(config, notices=(*config.notices, *notices))


def _plan(config: Config) -> Iterator[Fault]:
    try:
        config.plan()
    except PlanError as error:
        yield "parallel", str(error)


def _schedule(config: Config) -> Iterator[Fault]:
    total, scheduler = config.lr_total_steps, config.lr_scheduler
    warmup = int(scheduler.warmup_ratio * total)
    if scheduler.init_steps + warmup >= total:
        yield (
            "lr_scheduler.init_steps",
            f"{scheduler.init_steps} steps and a warm-up of {warmup} leave nothing of the {total} "
            "steps; take less of either",
        )
    if scheduler.eta_min > config.optimizer.lr:
        yield (
            "lr_scheduler.eta_min",
            f"{scheduler.eta_min:g} is above optimizer.lr={config.optimizer.lr:g}",
        )


def _scales(config: Config) -> Iterator[Fault]:
    scaler = config.grad_scaler
    if not scaler.min_scale <= scaler.initial_scale <= scaler.max_scale:
        yield (
            "grad_scaler.initial_scale",
            f"{scaler.initial_scale:g} does not lie between min_scale={scaler.min_scale:g} and "
            f"max_scale={scaler.max_scale:g}",
        )


def _data(config: Config) -> Iterator[Fault]:
    data = config.data
    if data.type in ("text", "chat") and data.train_folder is None:
        yield "data.train_folder", f"data.type={data.type!r} needs a folder of such files"
    if data.type != "text" and data.json_field is not None:
        yield "data.json_field", f"data.type={data.type!r} reads no JSON objects; leave it out"
    if data.type in _WITHOUT_FOLDER:
        for key in ("train_folder", "valid_folder"):
            if getattr(data, key) is not None:
                yield f"data.{key}", f"data.type={data.type!r} reads no files; leave it out"
    if data.type in ("text", "pydoc") and data.packing != "cut":
        yield "data.packing", f"data.type={data.type!r} is packed by 'cut'; prepare it as tokens"
    if data.type == "chat":
        plain = DataOptions(seq_len=data.seq_len)
        for key in _OF_PACKED_ROWS:
            if getattr(data, key) != getattr(plain, key):
                yield f"data.{key}", "data.type='chat' has one conversation a row; leave it out"
        if data.long_documents == "split":
            yield "data.long_documents", "a conversation is not split; write 'truncate'"
    if data.packing == "window" and data.max_documents not in (None, 1):
        yield "data.max_documents", "rows of packing='window' hold one text; leave it out"
    if data.one_row and (data.packing != "cut" or data.type not in ("tokenized", "random")):
        yield "data.one_row", "is for token files with packing='cut'; leave it out"
    if any(length < 0 for length in data.min_length_dict.values()):
        yield "data.min_length_dict", "lengths must be 0 or more"
    vocab_size = config.model.fields.get("vocab_size", BYTE_VOCABULARY)
    is_bytes = data.type == "pydoc" or (
        data.type in ("text", "chat") and config.tokenizer == "bytes"
    )
    if is_bytes and vocab_size < BYTE_VOCABULARY:
        yield (
            "model.vocab_size",
            f"data.type={data.type!r} needs {BYTE_VOCABULARY} for bytes, got {vocab_size}",
        )


def _smoothing(config: Config) -> Iterator[Fault]:
    if not config.loss.label_smoothing:
        return
    if config.hf_folder is not None:
        yield "loss.label_smoothing", "a model of model.hf has a loss of its own; leave it out"
    if config.model.fields.get("num_experts", 1) != 1:
        yield "loss.label_smoothing", "would leave out the routers' loss; leave it out"


def _checkpoints(config: Config) -> Iterator[Fault]:
    ckpt = config.ckpt
    for key in ("folder", "load_path", "stop_file"):
        if getattr(ckpt, key) == "":
            yield f"ckpt.{key}", "expected a path, got an empty text; leave it out"
    if ckpt.load_format != CHECKPOINT and ckpt.load_content != ("model",):
        yield (
            "ckpt.load_content",
            f"load_format={ckpt.load_format!r} holds the weights alone; write ['model']",
        )
    if config.model.type in DECODERS and ckpt.load_format not in (CHECKPOINT, "ilm"):
        yield (
            "ckpt.load_format",
            f"{ckpt.load_format!r} is not read into a model of type {config.model.type}, whose "
            "parameters have other names here; start from a checkpoint of ours, or from the seed",
        )
    known = ["model.type", *(f"model.{name}" for name in config.model.fields)]
    known += ["model.config.KEY"] if config.hf_folder is not None else []
    for key in ckpt.allow_change:
        is_of_json = config.hf_folder is not None and key.startswith("model.config.")
        if key not in known and not is_of_json:
            yield "ckpt.allow_change", f"{key!r} is no key of the model; it has {', '.join(known)}"
    if not ckpt.load_content:
        yield "ckpt.load_content", "expected at least one of what a checkpoint has"


def _monitor(config: Config) -> Iterator[Fault]:
    for key in ("loss_spike_ratio", "slow_rank_ratio"):
        if 0 < (ratio := getattr(config.monitor, key)) <= 1:
            yield f"monitor.{key}", f"expected more than 1, or 0 for off; got {ratio:g}"
    profiler = config.profiler
    if 0 < profiler.every < profiler.num_steps:
        yield (
            "profiler.every",
            f"expected at least profiler.num_steps={profiler.num_steps}, got {profiler.every}",
        )


_CHECKS: tuple[Callable[[Config], Iterator[Fault]], ...] = (
    _plan,
    _schedule,
    _scales,
    _data,
    _smoothing,
    _checkpoints,
    _monitor,
)


def _notices(config: Config) -> Iterator[str]:
    if config.data.type == "tokenized" and config.data.train_folder is None:
        yield "data.train_folder is not given, so the run trains on random tokens"
    if config.data.valid_every and config.data.valid_folder is None:
        yield "data.valid_every is set without data.valid_folder, so nothing is evaluated"
