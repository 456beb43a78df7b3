"""Whether weights are of the model that they are loaded into, by what their settings say.

Shapes say nothing of the rotary base, an epsilon or how many heads share a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from ilm_compile.config.changes import model_changes
from ilm_compile.convert.hf_files import read_config
from ilm_compile.convert.hf_model import folder_of, model_facts
from ilm_compile.errors import IlmCompileError
from ilm_compile.models import InternLM, InternLM2

Values = Mapping[str, Any]
_FAMILIES = ("llama", "internlm", "internlm2", "mistral")  # one computation under these names


@dataclass(frozen=True, slots=True)
class _Fact:
    """theirs: what config.json says of `what`. ours: the same of our config.

    key: of ours that decides it, None where no value of ours could. theirs is told our config too,
    for what begins only in rows longer than the model's.
    """

    what: str
    key: str | None
    theirs: Callable[[Values, Any], Any]
    ours: Callable[[Any], Any] = lambda config: None


def check_hf_config(
    model: nn.Module, hf: Values, where: str, allow_change: Collection[str] = ()
) -> None:
    """Raise `IlmCompileError` naming all in which config.json is of another model than `model`.

    allow_change: keys of ours, "model.rope_base", that may differ.
    """
    assert isinstance(model, InternLM | InternLM2)
    wrong, keys = [], dict[str, None]()
    for fact in _FACTS:
        theirs, ours = fact.theirs(hf, model.config), fact.ours(model.config)
        key = None if fact.key is None else f"model.{fact.key}"
        if theirs == ours or (key is not None and key in allow_change):
            continue
        by = "" if key is None else f" by {key}"
        wrong.append(f"{fact.what} is {_shown(theirs)}, here it is {_shown(ours)}{by}")
        keys.update({} if key is None else {key: None})
    if wrong:
        advice = f", or allow it by ckpt.allow_change = {list(keys)}" if keys else ""
        raise IlmCompileError(
            f"{where}: its config.json is of another model: {'; '.join(wrong)}; give the model "
            f"what the file says{advice}"
        )


def check_saved_config(
    model: nn.Module, saved: Values, where: str, allow_change: Collection[str] = ()
) -> None:
    """The same for the config that one of our checkpoints was made with."""
    if isinstance(model, InternLM | InternLM2):
        own = asdict(model.config)
    elif (folder := folder_of(model)) is not None:
        own = model_facts(read_config(folder) or {})
    else:
        return
    changes = model_changes(saved, {"model": own})
    if refused := [str(change) for change in changes if change.key not in allow_change]:
        raise IlmCompileError(
            f"{where}: is of another model (its value -> this one's): {'; '.join(refused)}; give "
            "the model what the checkpoint says"
        )


def _or_of(hf: Values, key: str, other: str) -> Any:
    return hf.get(other) if hf.get(key) is None else hf[key]


def _head_dim(hf: Values, _: Any) -> Any:
    size, heads = hf.get("hidden_size"), hf.get("num_attention_heads")
    divided = size / heads if isinstance(size, int) and isinstance(heads, int) and heads else None
    return divided if hf.get("head_dim") is None else hf["head_dim"]


def _family(hf: Values, _: Any) -> Any:
    kind = hf.get("model_type")
    return _FAMILIES[0] if kind in (None, *_FAMILIES) else kind


def _rope(hf: Values) -> Values:
    """transformers 5 has rope_parameters, those before rope_scaling, the hub's InternLM rotary."""
    found = (hf.get(key) for key in ("rope_parameters", "rope_scaling", "rotary"))
    return next((each for each in found if isinstance(each, Mapping)), {})


def _theta(hf: Values, _: Any) -> Any:
    rope, default = _rope(hf), hf.get("rope_theta", 10000.0)
    return rope.get("rope_theta", rope.get("base", default))


def _scaling(hf: Values, config: Any) -> Any:
    rope = _rope(hf)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "dynamic":  # begins in rows longer than that
        return None if _reaches(hf.get("max_position_embeddings", 2048), config) else dict(rope)
    return None if kind in ("default", None) else dict(rope)


def _window(hf: Values, config: Any) -> Any:
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    return None if window is None or _reaches(window, config) else window


def _reaches(length: Any, config: Any) -> bool:
    return isinstance(length, int) and length >= config.max_seq_len


def _activation(hf: Values, _: Any) -> Any:
    return {"swish": "silu"}.get(name := hf.get("hidden_act", "silu"), name)


def _turned(hf: Values, _: Any) -> Any:
    return _rope(hf).get("partial_rotary_factor", hf.get("partial_rotary_factor", 1))


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value}"


def _size(what: str, key: str, ours: str | None = None) -> _Fact:
    """One that config.json says as it is, and our config in its attribute `ours`, `key` if None."""
    return _Fact(what, key, lambda hf, _: hf.get(what), attrgetter(ours or key))


_FACTS = (
    _Fact("model_type", "type", _family, lambda config: _FAMILIES[0]),
    _size("num_hidden_layers", "num_layers"),
    _size("hidden_size", "hidden_size"),
    _size("intermediate_size", "mlp_ratio", "ffn_hidden_size"),
    _size("vocab_size", "vocab_size"),
    _size("num_attention_heads", "num_attention_heads"),
    _Fact(
        "num_key_value_heads",
        "num_kv_attention_heads",
        lambda hf, _: _or_of(hf, "num_key_value_heads", "num_attention_heads"),
        lambda config: config.num_kv_attention_heads,
    ),
    _Fact("head_dim", "num_attention_heads", _head_dim, lambda config: config.head_dim),
    _Fact(
        "rms_norm_eps",
        "layer_norm_epsilon",
        lambda hf, _: hf.get("rms_norm_eps", 1e-6),
        lambda config: config.layer_norm_epsilon,
    ),
    _Fact("rope_theta", "rope_base", _theta, lambda config: config.rope_base),
    _Fact("the scaling of rope", "rope_base", _scaling),
    _Fact("partial_rotary_factor", None, _turned, lambda config: 1),
    _Fact("sliding_window", None, _window),
    _Fact("hidden_act", None, _activation, lambda config: "silu"),
)
