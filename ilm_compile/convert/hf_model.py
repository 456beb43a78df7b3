"""Weights of models that transformers builds, under their own names, from a folder and back.

Most folders name their tensors as the model does, and are read and written in pieces. For the
others (experts that the model holds as one tensor, masks of old versions) transformers itself loads
and saves, which holds the model in memory whole.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ilm_compile.convert.hf_files import CONFIG, open_hf, read_config
from ilm_compile.convert.rewrite import check_shapes
from ilm_compile.convert.source import Aliased, Chosen, Source, Spec, read_whole
from ilm_compile.convert.write import new_folder, write_weights
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.checkpoint.boxes import Box

# What may differ between the config.json of two folders of one model.
NOT_OF_THE_MODEL = frozenset(
    (
        *("_name_or_path", "transformers_version", "architectures", "auto_map"),
        *("dtype", "torch_dtype", "use_cache"),
    )
)
# What a folder has beside its weights; config.json is written anew.
_BESIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)


class _Tensors:
    """Tensors that are in memory."""

    def __init__(self, where: str, tensors: Mapping[str, Tensor]) -> None:
        self.where = where
        self._tensors = tensors

    def specs(self) -> Mapping[str, Spec]:
        return {name: Spec(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str, box: Box) -> Tensor:
        return box.of(self._tensors[name]).clone()


def folder_of(model: nn.Module) -> Path | None:
    """The folder that transformers built the model from, None for any other model."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(name) if name else None


def model_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of the model, by "config.KEY"."""
    return {f"config.{key}": v for key, v in config.items() if key not in NOT_OF_THE_MODEL}


def open_transformers(model: nn.Module, path: Path, allow_change: Collection[str]) -> Source:
    """The weights at `path` under the names of `model`, which transformers built.

    Raises `IlmCompileError` if its config.json is of another model, other than in the keys of
    allow_change ("model.config.rope_theta"), or if a tensor is missing, misshapen or unknown.
    """
    _check_config(model, path, allow_change)
    source = with_tied(model, open_hf(path))
    try:
        check_shapes(source, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    except IlmCompileError:
        if path.is_dir():
            return _loaded(model, path)
        raise
    return source


def with_tied(model: nn.Module, source: Source) -> Source:
    """The source with every name of a tied parameter of which it has one."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    specs, aliases = source.specs(), dict[str, str]()
    for names in groups.values():
        if found := next((name for name in names if name in specs), None):
            aliases |= {name: found for name in names if name not in specs}
    return Aliased(source, aliases) if aliases else source


def write_folder(
    model: nn.Module, source: Source, path: Path, *, dtype: torch.dtype | None, shard_bytes: int
) -> int:
    """Write a folder that transformers loads; returns how many tensors it has.

    source: the tensors of `model`, under its names. Tokenizer and the like are those of the folder
    that `model` was built from. The folder is whole or not there.
    """
    folder = folder_of(model)
    assert folder is not None
    own = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    names = [name for name in own if name in model.state_dict()]
    chosen = Chosen(source, names)
    written = dtype or next(iter(chosen.specs().values())).dtype
    beside = {name: (folder / name).read_bytes() for name in _BESIDE if (folder / name).is_file()}
    if _stored_names(folder) == set(names):
        config = {key: v for key, v in (read_config(folder) or {}).items() if key != "torch_dtype"}
        config["dtype"] = str(written).removeprefix("torch.")
        extra = {**beside, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
        return write_weights(chosen, path, dtype=dtype, shard_bytes=shard_bytes, extra=extra)
    tensors = {name: read_whole(source, name).to(written) for name in model.state_dict()}
    model.load_state_dict(tensors, assign=True)
    saved: Any = model
    saved.config.use_cache = True
    with new_folder(path) as working:
        saved.save_pretrained(working, max_shard_size=shard_bytes)
        for name, data in beside.items():
            (working / name).write_bytes(data)
    return len(names)


def _stored_names(folder: Path) -> set[str]:
    """The tensors in a folder's files; none for one that has a config.json alone."""
    try:
        return set(open_hf(folder).specs())
    except IlmCompileError:
        return set()


def _loaded(model: nn.Module, path: Path) -> Source:
    """The tensors as transformers loads them."""
    config: Any = model.config
    try:
        loaded, found = type(model).from_pretrained(  # type: ignore[attr-defined]
            path,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise IlmCompileError(
            f"convert: {path}: transformers cannot load it: {' '.join(str(error).split())[:300]}"
        ) from error
    wrong = [f"{kind}: {keys}" for kind, keys in found.items() if keys]
    if wrong:
        raise IlmCompileError(
            f"convert: {path}: expected the tensors of {type(model).__name__}, got "
            f"{'; '.join(wrong)[:400]}"
        )
    return _Tensors(str(path), loaded.state_dict())


def _check_config(model: nn.Module, path: Path, allow_change: Collection[str]) -> None:
    folder, theirs = folder_of(model), read_config(path)
    if folder is None or theirs is None or folder.absolute() == path.absolute():
        return
    if wrong := list(_differences(theirs, read_config(folder) or {}, allow_change)):
        raise IlmCompileError(
            f"{path}: its config.json is of another model (its value -> that of {folder}): "
            f"{'; '.join(text for _, text in wrong)}; build the model from {path}, or allow it by "
            f"ckpt.allow_change = {[key for key, _ in wrong]}"
        )


def _differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], allowed: Collection[str]
) -> Iterator[tuple[str, str]]:
    old, new = model_facts(theirs), model_facts(ours)
    for name in sorted(old.keys() | new.keys()):
        key = f"model.{name}"
        if old.get(name) != new.get(name) and key not in allowed:
            yield key, f"{key}: {old.get(name)} -> {new.get(name)}"
