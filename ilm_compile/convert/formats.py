"""The formats by name: how each is opened as the model's own tensors, and written out of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ilm_compile.convert.checkpoint_files import CheckpointFiles
from ilm_compile.convert.hf_files import open_hf, read_config, with_head
from ilm_compile.convert.hf_model import (
    folder_of,
    open_transformers,
    with_tied,
    write_folder,
)
from ilm_compile.convert.rewrite import Joined, Split, check_shapes
from ilm_compile.convert.safetensors_files import SafetensorsFiles
from ilm_compile.convert.settings import check_hf_config, check_saved_config
from ilm_compile.convert.source import Source
from ilm_compile.convert.write import DEFAULT_SHARD_BYTES, write_weights
from ilm_compile.errors import IlmCompileError
from ilm_compile.models import InternLM, InternLM2
from ilm_compile.models.hf_rules import Rule, hf_internlm2_rules, hf_llama_rules

Rules = Callable[[nn.Module], list[Rule]]


@dataclass(frozen=True, slots=True)
class Format:
    """open: the files at a path, in the format's names. rules: from those to the model's names.

    Without rules the names are the model's. choose: the rules of a format of several kinds, by the
    model and what was opened. check: raises for a model that has no such files. open raises where
    settings beside the weights are of another model, other than in the keys given.
    """

    open: Callable[[nn.Module, Path, Collection[str]], Source]
    rules: Rules | None = None
    choose: Callable[[nn.Module, Source], Rules | None] | None = None
    check: Rules | None = None
    is_written: bool = True


def open_weights(
    model: nn.Module,
    path: str | Path,
    format_name: str,
    *,
    allow_change: Collection[str] = (),
) -> Source:
    """The weights at `path` under the names and in the layout of `model`, nothing read yet.

    format_name: of `FORMATS`. `model` may be on the meta device. Raises `IlmCompileError` if they
    are not the weights of such a model, by their shapes and by the config beside them, of which the
    keys in `allow_change`, such as "model.rope_base", may differ.
    """
    form = _format(format_name)
    source = form.open(model, Path(str(path).removeprefix("local:")), allow_change)
    rules = form.rules if form.choose is None else form.choose(model, source)
    if rules is not None:
        return Joined(source, rules(model))
    check_shapes(source, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    return source


def to_format(model: nn.Module, source: Source, format_name: str) -> Source:
    """`source`, which has the model's names, under the names of another format."""
    rules = _format(format_name).rules
    return source if rules is None else Split(source, rules(model))


def write_model(
    model: nn.Module,
    source: Source,
    format_name: str,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra: Mapping[str, str | bytes] | None = None,
) -> int:
    """Write the tensors of `model`, which `source` has, in a format; returns how many.

    As `write_weights`; a model of transformers becomes a folder that transformers loads.
    """
    if format_name == "hf":
        return write_folder(model, source, path, dtype=dtype, shard_bytes=shard_bytes)
    target = to_format(model, source, format_name)
    return write_weights(target, path, dtype=dtype, shard_bytes=shard_bytes, extra=extra)


def check_formats(model: nn.Module, source: str, target: str) -> None:
    """Raise `IlmCompileError` if weights of `model` cannot be converted so, reading no file."""
    if target == "hf" and folder_of(model) is None:
        raise IlmCompileError("convert: --to hf is for model.hf; write hf-llama or hf-internlm2")
    if not _format(target).is_written:
        written = [name for name, form in FORMATS.items() if form.is_written]
        raise IlmCompileError(f"convert: {target} is read only; expected --to of {written}")
    for rules in (_format(source).rules, _format(target).rules):
        if rules is not None:
            rules(model)
    if (check := _format(source).check) is not None:
        check(model)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise IlmCompileError(f"weights: expected a format of {list(FORMATS)}, got {name!r}")
    return FORMATS[name]


def _open_hf(model: nn.Module, path: Path, allow_change: Collection[str]) -> Source:
    config = read_config(path)
    if folder_of(model) is not None:
        return open_transformers(model, path, allow_change)
    if config is not None and isinstance(model, InternLM | InternLM2):
        check_hf_config(model, config, str(path), allow_change)
    return with_head(open_hf(path), config)


def _open_own(model: nn.Module, path: Path, allow_change: Collection[str]) -> Source:
    if not CheckpointFiles.is_at(path):
        return SafetensorsFiles(path)
    files = CheckpointFiles(path)
    check_saved_config(model, files.config, str(path), allow_change)
    return with_tied(model, files)


def _which_hf(model: nn.Module, source: Source) -> Rules | None:
    """Llama's names or those of the hub's InternLM2, told apart by the embedding's."""
    if folder_of(model) is not None:
        return None
    return _hub_rules if "model.tok_embeddings.weight" in source.specs() else llama_rules


def llama_rules(model: nn.Module) -> list[Rule]:
    """Return the rules of hf-llama; raises `IlmCompileError` for a model that is not InternLM's."""
    if not isinstance(model, InternLM | InternLM2):
        raise IlmCompileError(
            f"convert: expected an InternLM or InternLM2, got {type(model).__name__}"
        )
    return hf_llama_rules(model)


def _hub_rules(model: nn.Module) -> list[Rule]:
    if not isinstance(model, InternLM2):
        raise IlmCompileError(
            f"convert: hf-internlm2: expected an InternLM2, got {type(model).__name__}; Hugging "
            "Face's InternLM (v1) has the names of hf-llama"
        )
    return hf_internlm2_rules(model)


# `ilm_compile.internevo` adds InternEvo's.
FORMATS: dict[str, Format] = {
    "ilm": Format(_open_own),
    "hf": Format(_open_hf, choose=_which_hf),
    "hf-llama": Format(_open_hf, rules=llama_rules),
    "hf-internlm2": Format(_open_hf, rules=_hub_rules),
}
