"""The formats by name: how each is opened as the model's own tensors, and written out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ilm_compile.convert.checkpoint_files import CheckpointFiles
from ilm_compile.convert.internlm_files import InternLMFiles
from ilm_compile.convert.internlm_rules import choose_rules, split_shapes
from ilm_compile.convert.rewrite import Joined, Split, check_shapes
from ilm_compile.convert.safetensors_files import SafetensorsFiles
from ilm_compile.convert.source import Source, Spec
from ilm_compile.errors import IlmCompileError
from ilm_compile.models import InternLM, InternLM2
from ilm_compile.models.hf_rules import Rule, hf_internlm2_rules, hf_llama_rules
from ilm_compile.runtime.checkpoint.boxes import Box

Rules = Callable[[nn.Module], list[Rule]]


@dataclass(frozen=True, slots=True)
class Format:
    """open: the files at a path, in the format's names. rules: from those to the model's names.

    Without rules the names are the model's. choose: the rules of a format of several kinds.
    """

    open: Callable[[nn.Module, Path], Source]
    rules: Rules | None = None
    choose: Callable[[Source], Rules | None] | None = None
    is_written: bool = True


class Aliased:
    """A source with second names for some of its tensors, as a model with tied weights has."""

    def __init__(self, source: Source, aliases: Mapping[str, str]) -> None:
        self.where = source.where
        self._source = source
        self._aliases = aliases

    def specs(self) -> Mapping[str, Spec]:
        specs = dict(self._source.specs())
        return specs | {a: specs[name] for a, name in self._aliases.items() if name in specs}

    def read(self, name: str, box: Box) -> Tensor:
        return self._source.read(self._aliases.get(name, name), box)


def open_weights(model: nn.Module, path: str | Path, format_name: str) -> Source:
    """The weights at `path` under the names and in the layout of `model`, nothing read yet.

    format_name: of `FORMATS`. `model` may be on the meta device. Raises `IlmCompileError` if they
    are not the weights of such a model.
    """
    form = _format(format_name)
    source = form.open(model, Path(str(path).removeprefix("local:")))
    rules = form.rules if form.choose is None else form.choose(source)
    if rules is not None:
        return Joined(source, rules(model))
    check_shapes(source, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    return source


def to_format(model: nn.Module, source: Source, format_name: str) -> Source:
    """`source`, which has the model's names, under the names of another format."""
    rules = _format(format_name).rules
    return source if rules is None else Split(source, rules(model))


def check_formats(model: nn.Module, source: str, target: str) -> None:
    """Raise `IlmCompileError` if weights of `model` cannot be converted so, reading no file."""
    if not _format(target).is_written:
        written = [name for name, form in FORMATS.items() if form.is_written]
        raise IlmCompileError(f"convert: {target} is read only; expected --to of {written}")
    for rules in (_format(source).rules, _format(target).rules):
        if rules is not None:
            rules(model)
    if source == "internlm":
        _llama_rules(model)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise IlmCompileError(f"weights: expected a format of {list(FORMATS)}, got {name!r}")
    return FORMATS[name]


def _open_safetensors(model: nn.Module, path: Path) -> Source:
    return SafetensorsFiles(path)


def _open_own(model: nn.Module, path: Path) -> Source:
    if not CheckpointFiles.is_at(path):
        return SafetensorsFiles(path)
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            aliases[name] = first[id(parameter)]
    return Aliased(CheckpointFiles(path), aliases)


def _open_internlm(model: nn.Module, path: Path) -> Source:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return InternLMFiles(path, shapes | split_shapes(model))


def _which_hf(source: Source) -> Rules:
    """Llama's names or those of the hub's InternLM2, told apart by the embedding's."""
    return _hub_rules if "model.tok_embeddings.weight" in source.specs() else _llama_rules


def _llama_rules(model: nn.Module) -> list[Rule]:
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


FORMATS: dict[str, Format] = {
    "ilm": Format(_open_own),
    "hf": Format(_open_safetensors, choose=_which_hf, is_written=False),
    "hf-llama": Format(_open_safetensors, rules=_llama_rules),
    "hf-internlm2": Format(_open_safetensors, rules=_hub_rules),
    "internlm": Format(_open_internlm, choose=choose_rules, is_written=False),
}
