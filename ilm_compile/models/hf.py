"""State dicts in Hugging Face's names and layouts, and back.

`tensors` is always a mapping in the names of its side; when it is left out, the model's own weights
are used. All but `norm_head` is a permutation of rows, so gradients convert like weights. Nothing
here needs transformers.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.models.internlm import InternLM
from ilm_compile.models.internlm2 import InternLM2
from ilm_compile.models.packing import AnyConfig, QueryKeyValue, pack_qkv, unpack_qkv

AnyModel = InternLM | InternLM2

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
# Old checkpoints store the rotary frequencies, which follow from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


def to_hf_llama_state_dict(
    model: AnyModel, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Tensors of an InternLM or InternLM2 as transformers' LlamaForCausalLM names them."""
    out: dict[str, Tensor] = {}
    for name, value in _weights(model, tensors).items():
        target = _llama_name(model, name)
        if "{qkv}" in target:
            for letter, part in unpack_qkv(model.config, value)._asdict().items():
                out[target.replace("{qkv}", letter)] = part
        else:
            out[target] = value
    return out


def from_hf_llama_state_dict(model: AnyModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hf_llama_state_dict`: tensors in the names of `model`, to load into it."""
    source = _Source("from_hf_llama_state_dict", tensors)
    out = {}
    for name, parameter in model.named_parameters():
        target = _llama_name(model, name)
        tail = tuple(parameter.shape[1:])
        if "{qkv}" in target:
            parts = (
                source.take(target.replace("{qkv}", letter), (heads * model.config.head_dim, *tail))
                for letter, heads in _heads(model.config).items()
            )
            out[name] = pack_qkv(model.config, QueryKeyValue(*parts))
        else:
            out[name] = source.take(target, tuple(parameter.shape))
    source.finish()
    return out


def to_hf_internlm2_state_dict(
    model: InternLM2, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Tensors of an InternLM2 as the InternLM2ForCausalLM on the Hugging Face hub names them."""
    _require_internlm2(model, "to_hf_internlm2_state_dict")
    hub = replace(model.config, adapt_hf=True)
    out = {}
    for name, value in _weights(model, tensors).items():
        if "wqkv" in name:
            value = pack_qkv(hub, unpack_qkv(model.config, value))
        out[_hub_name(name)] = value
    return out


def from_hf_internlm2_state_dict(
    model: InternLM2, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of `to_hf_internlm2_state_dict`."""
    _require_internlm2(model, "from_hf_internlm2_state_dict")
    hub = replace(model.config, adapt_hf=True)
    source = _Source("from_hf_internlm2_state_dict", tensors)
    out = {}
    for name, parameter in model.named_parameters():
        value = source.take(_hub_name(name), tuple(parameter.shape))
        if "wqkv" in name:
            value = pack_qkv(model.config, unpack_qkv(hub, value))
        out[name] = value
    source.finish()
    return out


class _Source:
    """Tensors to be taken by name, each once."""

    def __init__(self, task: str, tensors: Mapping[str, Tensor]) -> None:
        self._task = task
        self._left = {k: v for k, v in tensors.items() if not k.endswith(_IGNORED_SUFFIX)}

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


def _weights(model: AnyModel, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors to convert, with the scaling of norm_head done once and for all."""
    weights: dict[str, Any] = dict(model.state_dict() if tensors is None else tensors)
    if isinstance(model, InternLM2) and model.config.norm_head and "output.weight" in weights:
        weights["output.weight"] = F.normalize(weights["output.weight"])
    return weights


def _llama_name(model: AnyModel, name: str) -> str:
    if isinstance(model, InternLM2) and model.config.apply_post_layer_norm:
        raise IlmCompileError(
            "LlamaForCausalLM has its norms before each part: a model with "
            "apply_post_layer_norm=True cannot be expressed in it"
        )
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return _LLAMA_NAMES[type(model)][name]
    kind = name.replace(layer.group(), ".{i}.", 1)
    return _LLAMA_NAMES[type(model)][kind].replace("{i}", layer.group(1))


def _hub_name(name: str) -> str:
    return name if name.startswith("output.") else f"model.{name}"


def _heads(config: AnyConfig) -> dict[str, int]:
    kv_heads = config.num_kv_attention_heads
    return {"q": config.num_attention_heads, "k": kv_heads, "v": kv_heads}


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
