"""The section `model`: a type of `MODEL_INITIALIZER` and the keys that its builder takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from ilm_compile.config.options import (
    WRONG,
    hints,
    option,
    read_section,
    read_value,
    unknown_key,
)
from ilm_compile.config.table import Place, Problems, Table
from ilm_compile.errors import IlmCompileError
from ilm_compile.models import (
    DECODERS,
    HF,
    MODEL_INITIALIZER,
    InternLM2Config,
    InternLMConfig,
    ModelConfig,
)

FAMILIES: dict[str, type[ModelConfig]] = {
    "INTERNLM": InternLMConfig,
    "INTERNLM2": InternLM2Config,
    "INTERNLM2_PUBLIC": InternLM2Config,
    "INTERNLM3": InternLM2Config,
    "LLAMA": InternLM2Config,
    "LLAMA2": InternLM2Config,
    **DECODERS,
}
# Fields of ours that other keys of the config set.
FROM_ELSEWHERE = {"seed": "train.seed", "max_seq_len": "data.seq_len"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """type: a name in `MODEL_INITIALIZER`. fields: the keywords of its builder, defaults too."""

    type: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class HfOptions:
    """Any causal language model that transformers builds from the config.json of a folder."""

    hf: str = option(help="the folder: config.json, *.safetensors, tokenizer.json")
    from_seed: bool = option(False, "fresh weights drawn from train.seed, not those in the folder")


def read_model(table: Mapping[str, Any], place: Place, problems: Problems) -> ModelOptions | None:
    """The section, None after adding a problem. Needs `type` and what that type requires."""
    places = table.places if isinstance(table, Table) else {}
    name = table.get("type", HF if "hf" in table else None)
    known = ", ".join(MODEL_INITIALIZER.names())
    if not isinstance(name, str):
        problems.add(place, f"model.type is missing: one of {known}; or model.hf, a folder")
        return None
    if not MODEL_INITIALIZER.has(name):
        problems.add(
            places.get("type", place),
            f"model.type: unknown type {name!r}, expected one of {known}; register another with "
            "MODEL_INITIALIZER.register_module",
        )
        return None
    given = {key: value for key, value in table.items() if key != "type" and value is not None}
    if name == HF:
        given.pop("type", None)
        found = read_section(HfOptions, Table(given, place), "model", place, problems)
        return None if found is None else ModelOptions(type=HF, fields=asdict(found))
    if name not in FAMILIES:
        return _custom(name, given, places, place, problems)
    values = _family_fields(FAMILIES[name], given, places, place, problems)
    if values is None:
        return None
    try:
        config = FAMILIES[name](**values)
    except IlmCompileError as error:
        problems.add(place, f"model: {error}")
        return None
    resolved = asdict(config)
    return ModelOptions(
        type=name, fields={key: resolved[key] for key in resolved if key not in FROM_ELSEWHERE}
    )


def _family_fields(
    family: type[ModelConfig],
    given: Mapping[str, Any],
    places: Mapping[str, Place],
    place: Place,
    problems: Problems,
) -> dict[str, Any] | None:
    known, values, is_right = {item.name: item for item in fields(family)}, {}, True
    for key, value in given.items():
        where = places.get(key, place)
        if key in FROM_ELSEWHERE:
            problems.add(where, f"model.{key} is not a key; write {FROM_ELSEWHERE[key]}")
        elif key not in known:
            keys = [name for name in known if name not in FROM_ELSEWHERE]
            problems.add(where, unknown_key(f"model.{key}", keys, "model"))
        else:
            hint = hints(family)[key]
            values[key] = read_value(hint, value, known[key], f"model.{key}", where, problems)
        is_right &= values.get(key, WRONG) is not WRONG
    for key, item in known.items():
        if item.default is MISSING and key not in given:
            problems.add(place, f"model.{key} is missing")
            is_right = False
    return values if is_right else None


def _custom(
    name: str,
    given: Mapping[str, Any],
    places: Mapping[str, Place],
    place: Place,
    problems: Problems,
) -> ModelOptions | None:
    """A type that the user registered: its keys are the parameters of its builder."""
    parameters = inspect.signature(MODEL_INITIALIZER.get_module(name)).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        unknown = [key for key in given if key not in parameters]
        for key in unknown:
            message = unknown_key(f"model.{key}", list(parameters), "model")
            problems.add(places.get(key, place), message)
        if unknown:
            return None
    return ModelOptions(type=name, fields=plain(given))


def plain(value: Any) -> Any:
    """The value with tables as dicts and tuples as lists, as a TOML file would give it back."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
