"""InternEvo's checkpoints with q, k and v in matrices of their own (enable_qkv_fusion=False)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ilm_compile.convert.source import Source
from ilm_compile.models import InternLM, InternLM2, InternLM2Config
from ilm_compile.models.hf_rules import Rule, Shape
from ilm_compile.models.packing import AnyConfig, QueryKeyValue, pack_qkv

_FUSED = (".Wqkv.", ".wqkv.")
_APART = (".wq.", ".wk.", ".wv.")


def split_shapes(model: nn.Module) -> dict[str, Shape]:
    """The shapes of those matrices and their biases, by name; none for other models."""
    return {
        name: shape
        for rule in split_rules(model)
        if rule.join is not None
        for name, shape in zip(rule.theirs, rule.their_shapes, strict=True)
    }


def choose_rules(source: Source) -> Callable[[nn.Module], list[Rule]] | None:
    """The rules if the source holds such matrices."""
    has_parts = any(part in name for name in source.specs() for part in _APART)
    return split_rules if has_parts else None


def split_rules(model: nn.Module) -> list[Rule]:
    """A rule for each parameter. The rows of each head are as in the fused matrix."""
    return [_rule(model, name, tuple(p.shape)) for name, p in model.named_parameters()]


def _rule(model: nn.Module, name: str, shape: Shape) -> Rule:
    fused = next((part for part in _FUSED if part in name), None)
    if fused is None or not isinstance(model, InternLM | InternLM2):
        return Rule(name, shape, (name,), (shape,))
    config: AnyConfig = model.config
    if isinstance(config, InternLM2Config):
        config = replace(config, adapt_hf=True)  # pack_qkv would turn them otherwise
    heads = (config.num_attention_heads, *2 * (config.num_kv_attention_heads,))

    def join(parts: Sequence[Tensor]) -> Tensor:
        return pack_qkv(config, QueryKeyValue(*parts))

    return Rule(
        name,
        shape,
        tuple(name.replace(fused, part) for part in _APART),
        tuple((number * config.head_dim, *shape[1:]) for number in heads),
        join=join,
    )
