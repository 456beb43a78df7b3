"""State dicts in Hugging Face's names and layouts, and back.

`tensors` is always a mapping in the names of its side; when it is left out, the model's own weights
are used. Nothing here needs transformers.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.models.hf_rules import (
    IGNORED_SUFFIX,
    AnyModel,
    Rule,
    hf_internlm2_rules,
    hf_llama_rules,
)
from ilm_compile.models.internlm2 import InternLM2


def to_hf_llama_state_dict(
    model: AnyModel, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Tensors of an InternLM or InternLM2 as transformers' LlamaForCausalLM names them."""
    return _split(hf_llama_rules(model), model, tensors)


def from_hf_llama_state_dict(model: AnyModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hf_llama_state_dict`: tensors in the names of `model`, to load into it."""
    return _join(hf_llama_rules(model), _Source("from_hf_llama_state_dict", tensors))


def to_hf_internlm2_state_dict(
    model: InternLM2, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Tensors of an InternLM2 as the InternLM2ForCausalLM on the Hugging Face hub names them."""
    _require_internlm2(model, "to_hf_internlm2_state_dict")
    return _split(hf_internlm2_rules(model), model, tensors)


def from_hf_internlm2_state_dict(
    model: InternLM2, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of `to_hf_internlm2_state_dict`."""
    _require_internlm2(model, "from_hf_internlm2_state_dict")
    return _join(hf_internlm2_rules(model), _Source("from_hf_internlm2_state_dict", tensors))


class _Source:
    """Tensors to be taken by name, each once."""

    def __init__(self, task: str, tensors: Mapping[str, Tensor]) -> None:
        self._task = task
        self._left = {k: v for k, v in tensors.items() if not k.endswith(IGNORED_SUFFIX)}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._left:
            raise IlmCompileError(f"{self._task}: {name} is missing from the state dict")
        value = self._left.pop(name)
        if tuple(value.shape) != shape:
            raise IlmCompileError(
                f"{self._task}: {name}: expected shape {shape}, got {tuple(value.shape)}"
            )
        return value

    def finish(self) -> None:
        if self._left:
            raise IlmCompileError(
                f"{self._task}: the model has no place for {_some(sorted(self._left))}"
            )


def _split(
    rules: list[Rule], model: AnyModel, tensors: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Their tensors of ours: of those there are, so that gradients may be a part."""
    given = model.state_dict() if tensors is None else tensors
    by_name = {rule.ours: rule for rule in rules}
    out: dict[str, Tensor] = {}
    for name, value in given.items():
        rule = by_name[name]
        parts = (value,) if rule.split is None else rule.split(value)
        out.update(zip(rule.theirs, parts, strict=True))
    return out


def _join(rules: list[Rule], source: _Source) -> dict[str, Tensor]:
    out = {}
    for rule in rules:
        parts = [source.take(*each) for each in zip(rule.theirs, rule.their_shapes, strict=True)]
        out[rule.ours] = parts[0] if rule.join is None else rule.join(parts)
    source.finish()
    return out


def _require_internlm2(model: AnyModel, task: str) -> None:
    if not isinstance(model, InternLM2):
        raise IlmCompileError(
            f"{task}: expected an InternLM2, got {type(model).__name__}; "
            "Hugging Face's InternLM (v1) has the names of to_hf_llama_state_dict"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
