"""Which tensors of a model are which of Hugging Face's, and how one becomes the other.

One `Rule` for every tensor of a model. All but `norm_head` is a permutation of rows, so gradients
convert like weights. Rules know names and layouts only: they serve whole state dicts (`hf`) as well
as files that are converted piece by piece.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.models.internlm import InternLM
from ilm_compile.models.internlm2 import InternLM2
from ilm_compile.models.packing import AnyConfig, QueryKeyValue, pack_qkv, unpack_qkv

AnyModel = InternLM | InternLM2
Shape = tuple[int, ...]

# Our name to that of LlamaForCausalLM, {i} being the layer; "{qkv}" stands for q, k and v.
_LLAMA_NAMES = {
    InternLM: {
        "embedding.weight": "model.embed_tokens.weight",
        "blocks.{i}.norm1.weight": "model.layers.{i}.input_layernorm.weight",
        "blocks.{i}.mixer.Wqkv.weight": "model.layers.{i}.self_attn.{qkv}_proj.weight",
        "blocks.{i}.mixer.Wqkv.bias": "model.layers.{i}.self_attn.{qkv}_proj.bias",
        "blocks.{i}.mixer.out_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
        "blocks.{i}.mixer.out_proj.bias": "model.layers.{i}.self_attn.o_proj.bias",
        "blocks.{i}.norm2.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "blocks.{i}.mlp.w1.weight": "model.layers.{i}.mlp.gate_proj.weight",
        "blocks.{i}.mlp.w3.weight": "model.layers.{i}.mlp.up_proj.weight",
        "blocks.{i}.mlp.w2.weight": "model.layers.{i}.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
    InternLM2: {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "layers.{i}.attention.wqkv.weight": "model.layers.{i}.self_attn.{qkv}_proj.weight",
        "layers.{i}.attention.wqkv.bias": "model.layers.{i}.self_attn.{qkv}_proj.bias",
        "layers.{i}.attention.wo.weight": "model.layers.{i}.self_attn.o_proj.weight",
        "layers.{i}.attention.wo.bias": "model.layers.{i}.self_attn.o_proj.bias",
        "layers.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.feed_forward.w1.weight": "model.layers.{i}.mlp.gate_proj.weight",
        "layers.{i}.feed_forward.w3.weight": "model.layers.{i}.mlp.up_proj.weight",
        "layers.{i}.feed_forward.w2.weight": "model.layers.{i}.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    },
}
# Of any checkpoint: the rotary frequencies, which follow from the config.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class Rule:
    """`ours`, of shape `our_shape`, is `theirs`, of shapes `their_shapes`.

    join makes our tensor of theirs, split theirs of ours; None for equal tensors. is_rowwise: both
    can be done row by row.
    """

    ours: str
    our_shape: Shape
    theirs: tuple[str, ...]
    their_shapes: tuple[Shape, ...]
    join: Callable[[Sequence[Tensor]], Tensor] | None = None
    split: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    is_rowwise: bool = False


def hf_llama_rules(model: AnyModel) -> list[Rule]:
    """Of every parameter, with the names of transformers' LlamaForCausalLM."""
    return [_llama_rule(model, name, tuple(p.shape)) for name, p in model.named_parameters()]


def hf_internlm2_rules(model: InternLM2) -> list[Rule]:
    """Of every parameter, with the names of InternLM2ForCausalLM on the Hugging Face hub."""
    return [_hub_rule(model, name, tuple(p.shape)) for name, p in model.named_parameters()]


def _llama_rule(model: AnyModel, name: str, shape: Shape) -> Rule:
    target, config = _llama_name(model, name), model.config
    if "{qkv}" not in target:
        return _plain(model, name, target, shape)
    heads = {
        "q": config.num_attention_heads,
        "k": config.num_kv_attention_heads,
        "v": config.num_kv_attention_heads,
    }
    return Rule(
        name,
        shape,
        tuple(target.replace("{qkv}", letter) for letter in heads),
        tuple((number * config.head_dim, *shape[1:]) for number in heads.values()),
        join=lambda parts: pack_qkv(config, QueryKeyValue(*parts)),
        split=lambda fused: tuple(unpack_qkv(config, fused)),
    )


def _hub_rule(model: InternLM2, name: str, shape: Shape) -> Rule:
    target = name if name.startswith("output.") else f"model.{name}"
    hub, config = replace(model.config, adapt_hf=True), model.config
    if "wqkv" not in name or config.adapt_hf:
        return _plain(model, name, target, shape)
    return Rule(
        name,
        shape,
        (target,),
        (shape,),
        join=lambda parts: _repack(hub, config, parts[0]),
        split=lambda fused: (_repack(config, hub, fused),),
    )


def _plain(model: AnyModel, ours: str, theirs: str, shape: Shape) -> Rule:
    """The same tensor; with `norm_head`, scaled once and for all on the way out."""
    is_scaled = isinstance(model, InternLM2) and model.config.norm_head and ours == "output.weight"
    split = (lambda rows: (F.normalize(rows),)) if is_scaled else None
    return Rule(ours, shape, (theirs,), (shape,), split=split, is_rowwise=True)


def _repack(source: AnyConfig, target: AnyConfig, fused: Tensor) -> Tensor:
    return pack_qkv(target, unpack_qkv(source, fused))


def _llama_name(model: AnyModel, name: str) -> str:
    if isinstance(model, InternLM2) and model.config.apply_post_layer_norm:
        raise IlmCompileError(
            "LlamaForCausalLM has its norms before each part: a model with "
            "apply_post_layer_norm=True cannot be expressed in it"
        )
    if model.config.norm_type != "rmsnorm":
        raise IlmCompileError(
            f"LlamaForCausalLM has RMSNorm: a model with norm_type={model.config.norm_type!r} "
            "cannot be expressed in it"
        )
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return _LLAMA_NAMES[type(model)][name]
    kind = name.replace(layer.group(), ".{i}.", 1)
    return _LLAMA_NAMES[type(model)][kind].replace("{i}", layer.group(1))
