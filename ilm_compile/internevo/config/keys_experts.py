"""InternEvo's keys of mixtures of experts: those of `model`, of `moe`, and `moe_layer_kwargs`.

`moe` and, later, `model.moe_layer_kwargs` hold what its layers take; here all are keys of `model`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ilm_compile.config.model_section import FAMILIES
from ilm_compile.config.options import shown
from ilm_compile.config.table import Table
from ilm_compile.internevo.config.translate import Fate, NoEffect, Refusal, Spread
from ilm_compile.models import DECODERS

Function = Callable[[Any, Table], Mapping[str, Any]]
_DROPLESS = ("Dropless", "MegaBlock-Dropless", "MegaBlock-D")
_LAYERS = ("moe", "model.moe_layer_kwargs")


def model_type(config: Table) -> str:
    """The type that a config of theirs names, INTERNLM if it names none."""
    named = config.find("model_type") or config.find("model.type")
    return str(named[0]) if named is not None else "INTERNLM"


def _of_layer(config: Table, key: str, default: Any) -> Any:
    """What the layer of experts is given under a key, wherever that stands."""
    paths = (*(f"{place}.{key}" for place in _LAYERS), f"model.moe_{key}")
    found = (config.find(path) for path in paths)
    return next((item[0] for item in found if item is not None), default)


def _of_model(key: str, function: Function, *harmless: Any, told: str, target: str) -> Spread:
    """A key of `model`: for a type with experts what `function` makes of it.

    A registered model gets it as it is; for one without experts it must be one of `harmless`.
    """

    def spread(value: Any, config: Table) -> Mapping[str, Any]:
        name = model_type(config)
        if name in DECODERS:
            return function(value, config)
        if name not in FAMILIES:
            return {f"model.{key}": value}
        if not harmless:
            raise NoEffect("there are no experts in this model")
        if value not in harmless:
            raise Refusal(
                f"{shown(value)}: there are no experts in {name}; model_type is one of "
                f"{', '.join(DECODERS)}, or write model.hf, or register a model of your own"
            )
        return {}

    return Spread(spread, told, tuple(f"model.{name}" for name in (key, target) if name))


def _of_layers(function: Function, told: str, target: str) -> Spread:
    """A key of the layer of experts."""

    def spread(value: Any, config: Table) -> Mapping[str, Any]:
        if model_type(config) not in DECODERS:
            raise NoEffect("a registered model takes what it needs from `model`")
        return function(value, config)

    return Spread(spread, told, (f"model.{target}",) if target else ())


def _becomes(key: str) -> Function:
    return lambda value, config: {f"model.{key}": value}


def _only(*values: Any, instead: str) -> Function:
    def check(value: Any, config: Table) -> Mapping[str, Any]:
        if value not in values:
            raise Refusal(f"{shown(value)} is not supported: {instead}")
        return {}

    return check


def _no_number(value: Any, config: Table) -> Mapping[str, Any]:
    return {}


def _kind(value: Any, config: Table) -> Mapping[str, Any]:
    """How rows reach their experts, and what the routers' loss counts."""
    experts = config.find("model.num_experts")
    if experts is None or experts[0] in (0, 1):
        return {}
    if value == "GShard":
        return {"model.balance": "first"}
    if value not in _DROPLESS:
        raise Refusal(
            f"{shown(value)} is not supported: it drops other rows than GShard; write GShard or "
            "Dropless"
        )
    over_layers = not _of_layer(config, "aux_loss_by_layer", model_type(config) != "QWEN3MOE")
    return {"model.balance": "layers" if over_layers else "all", "model.capacity_factor": 0.0}


def _capacity(value: Any, config: Table) -> Mapping[str, Any]:
    kind = config.find("model.moe_type")
    if kind is not None and kind[0] in _DROPLESS:
        return _only(None, instead="with a capacity it is moe_type='GShard'")(value, config)
    drops = _of_layer(config, "drop_tokens", True)
    return {"model.capacity_factor": value} if drops else {}


def _eval_capacity(value: Any, config: Table) -> Mapping[str, Any]:
    if value != _of_layer(config, "capacity_factor", 1.0):
        raise NoEffect("an evaluation takes the capacity_factor of training")
    return {}


def _drops(value: Any, config: Table) -> Mapping[str, Any]:
    return {} if value else {"model.capacity_factor": 0.0}


def _residual(value: Any, config: Table) -> Mapping[str, Any]:
    return {"model.num_shared_experts": int(bool(value))}


def _loss(value: Any, config: Table) -> Mapping[str, Any]:
    experts = config.find("model.num_experts")
    if model_type(config) not in DECODERS or experts is None or experts[0] in (0, 1):
        raise NoEffect("what a model adds to its loss, it takes from `model`")
    return {"model.moe_loss_coeff": value}


# A key of the layers of experts: what becomes of it, in words, and the key of `model` that it sets.
_LAYER: dict[str, tuple[Function, str, str]] = {
    "top_k": (_becomes("top_k"), "`model.top_k`", "top_k"),
    "capacity_factor": (_capacity, "`model.capacity_factor`", "capacity_factor"),
    "eval_capacity_factor": (_eval_capacity, "no effect: capacity_factor counts", ""),
    "min_capacity": (_becomes("min_capacity"), "`model.min_capacity`", "min_capacity"),
    "drop_tokens": (_drops, "False sets `model.capacity_factor` = 0", "capacity_factor"),
    "noisy_gate_policy": (_only("None", instead="no noise is added"), "only None", ""),
    **dict.fromkeys(("use_rts", "use_fused_gating"), (_no_number, "as use_fused_gating=True", "")),
    "normalize_expert_weights": (
        _becomes("normalize_experts"),
        "`model.normalize_experts`",
        "normalize_experts",
    ),
    "aux_loss_by_layer": (_no_number, "see model.moe_type", ""),
    "scoring_func": (_only("softmax", instead="scores are a softmax"), "only softmax", ""),
    "routed_scaling_factor": (_only(1, instead="outputs are not scaled"), "only 1", ""),
    "drop_and_pad": (_only(False, instead="no row is padded"), "only False", ""),
    **dict.fromkeys(
        (
            *("use_grouped_mlp", "enable_fused_permute", "token_dispatch_policy", "drop_policy"),
            *("deterministic_mode", "parallel_mode"),
        ),
        (_no_number, "no effect: it changes no number", ""),
    ),
}
_GATE_K = {"gate_k": _LAYER["top_k"]}  # as top_k was called when these were keys of `model`
_EARLIEST = (
    *("capacity_factor", "eval_capacity_factor", "min_capacity", "drop_tokens"),
    *("noisy_gate_policy", "use_rts", "gate_k"),
)

EXPERTS: dict[str, Fate] = {
    "model.num_experts": _of_model(
        "num_experts",
        lambda value, config: {"model.num_experts": value or 1},
        *(0, 1),
        told="`model.num_experts`",
        target="num_experts",
    ),
    "model.moe_use_residual": _of_model(
        "moe_use_residual",
        _residual,
        False,
        told="True sets `model.num_shared_experts` = 1",
        target="num_shared_experts",
    ),
    "model.moe_type": _of_model(
        "moe_type",
        _kind,
        told="GShard and Dropless set `model.balance` and `model.capacity_factor`",
        target="balance",
    ),
    "loss.moe_loss_coeff": Spread(
        _loss, "`model.moe_loss_coeff` of a type with experts", ("model.moe_loss_coeff",)
    ),
    **{f"{place}.{key}": _of_layers(*how) for place in _LAYERS for key, how in _LAYER.items()},
    **{
        f"model.moe_{key}": _of_model(f"moe_{key}", function, told=told, target=target)
        for key, (function, told, target) in (_LAYER | _GATE_K).items()
        if key in _EARLIEST
    },
}
