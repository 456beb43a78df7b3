"""A small model with the structure of a big one, so that a proof of its plan takes seconds.

Sizes shrink, structure stays: the number of query heads per key-value head, which counts the tensor
parallel size divides and which not, every distinct kind of layer, and enough layers for the plan's
stages. Sizes are read from the model's configuration by the names in the tables below; a model
without such a configuration is verified as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from ilm_compile.errors import PlanError

HEAD_DIM = 8
WINDOW = 8  # of attention, fewer tokens than a small micro-batch has
MAX_PARAMETERS = 20_000_000  # of a model that is verified unshrunk

LAYERS = ("num_layers", "num_hidden_layers", "n_layer", "n_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KV_HEADS = ("num_kv_attention_heads", "num_key_value_heads", "num_kv_heads")
HIDDEN = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
FFN = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "moe_intermediate_size")
VOCAB = ("vocab_size",)
WINDOWS = ("sliding_window", "attention_chunk_size")
ROTARY = ("rotary_dim",)
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def shrink(
    model: nn.Module,
    *,
    tp: int,
    num_stages: int,
    cuts_per_block: int = 2,
    num_tokens: int = 0,
    keep_dropout: bool = False,
) -> nn.Module:
    """Return a small real model of `model`'s class in float64, or `model` itself in float64.

    There are blocks enough for `num_stages` stages, if each can be cut at `cuts_per_block` places.
    An attention window that is shorter than the `num_tokens` of a full-size row stays shorter than
    a small row; a longer one stays longer.

    The weights are random, with no norm weight left at one and no bias at zero; dropout is off
    unless it is kept. Raises `PlanError` if the model is too large to verify and cannot be shrunk.
    """
    config = getattr(model, "config", None)
    depth = max(2, -(-num_stages // cuts_per_block))
    small = None if config is None else _shrunk(config, tp, depth, num_tokens, keep_dropout)
    if small is None:
        size = sum(p.numel() for p in model.parameters())
        if size > MAX_PARAMETERS or any(p.is_meta for p in model.parameters()):
            raise PlanError(
                f"verify: {type(model).__name__} has {size:,} parameters and no .config to shrink "
                "it by; pass a small real model of the same structure"
            )
        result = copy.deepcopy(model)
    else:
        result = type(model)(small)
    result = result.double().train()
    for module in result.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and not keep_dropout:
            module.p = 0.0  # the plain model would drop other elements
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in result.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.05)
    return result


def _shrunk(config: Any, tp: int, depth: int, num_tokens: int, keep_dropout: bool) -> Any | None:
    """Return a copy of `config` with small sizes, None if it names no layers, heads or width."""
    layers, heads, hidden = (_first(config, names) for names in (LAYERS, HEADS, HIDDEN))
    if layers is None or heads is None or hidden is None:
        return None
    num_heads = getattr(config, heads)
    kv = _first(config, KV_HEADS)
    num_kv = (getattr(config, kv) if kv else None) or num_heads
    small_kv = _like(num_kv, tp)
    small_heads = small_kv * (num_heads // num_kv)
    changes: dict[str, Any] = {heads: small_heads, layers: _num_layers(config, layers, depth)}
    if kv:
        changes[kv] = small_kv
    changes.update({n: small_heads * HEAD_DIM for n in HIDDEN if getattr(config, n, None)})
    changes.update({n: 2 * small_heads * HEAD_DIM for n in FFN if _is_size(config, n)})
    changes.update({n: 32 * tp + getattr(config, n) % tp for n in VOCAB})
    windows = [n for n in WINDOWS if _is_size(config, n) and getattr(config, n) < num_tokens]
    changes.update({n: WINDOW for n in windows})
    changes.update({n: HEAD_DIM // 2 for n in ROTARY if _is_size(config, n)})
    changes.update({n: 64 for n in POSITIONS if _is_size(config, n)})
    if hasattr(config, "to_dict"):
        return _hugging_face(config, changes, keep_dropout)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return None
    known = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{n: v for n, v in changes.items() if n in known})


def _hugging_face(config: Any, changes: dict[str, Any], keep_dropout: bool) -> Any:
    """Return a Hugging Face configuration made anew, so that what it derives fits the changes."""
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    values = {**config.to_dict(), **changes, **tokens}
    if values.get("head_dim"):
        values["head_dim"] = HEAD_DIM
    depth = next((changes[name] for name in LAYERS if name in changes), 0)
    for name, value in values.items():
        if isinstance(value, list) and len(value) == getattr(config, "num_hidden_layers", -1):
            values[name] = value[:depth]
        if isinstance(value, float) and "drop" in name and not keep_dropout:
            values[name] = 0.0
    return type(config).from_dict(values)


def _first(config: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if _is_size(config, name)), None)


def _is_size(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _like(count: int, tp: int) -> int:
    """Return a small count that `tp` divides if and only if it divides `count`.

    It is 1 for 1 only: a dimension of size 1 makes other graphs.
    """
    if count % tp == 0:
        return min(count, max(tp, 2))
    return count if count < tp else tp + count % tp


def _num_layers(config: Any, name: str, depth: int) -> int:
    """Return `depth` layers or more, so that every kind of layer is among them."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_types", None) or []
    kinds = kinds if all(isinstance(kind, str) for kind in kinds) else []
    distinct = max((kinds.index(kind) for kind in kinds), default=0) + 1
    return min(int(getattr(config, name)), max(distinct, depth))
