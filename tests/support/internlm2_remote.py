"""A model written the way InternLM publishes InternLM2 beside its weights, retyped from knowledge.

What matters is kept as it is there: packed and grouped wqkv taken apart by rearranging, a rotary
embedding that caches its table (or computes it with autocast off), a causal mask filled with a
tensor, branches for past keys and checkpointing, checks of sizes, and weights that are initialised
by a function of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import CrossEntropyLoss
from torch.nn import functional as F

Past = tuple[Tensor, Tensor]


@dataclass
class RemoteConfig:
    """The fields of config.json that the model reads."""

    vocab_size: int = 32
    hidden_size: int = 16
    intermediate_size: int = 24
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rotary: str = "cached"
    initializer_range: float = 0.2
    pad_token_id: int = 2
    bias: bool = False
    use_cache: bool = True


@dataclass
class Output:
    """What the model returns."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: tuple[Past, ...] | None = None


def make_causal_mask(shape: torch.Size, dtype: torch.dtype, device: Any, past: int) -> Tensor:
    """Additive mask [b, 1, q, k]."""
    rows, length = shape
    lowest = torch.tensor(torch.finfo(dtype).min, device=device)
    mask = torch.full((length, length), lowest, device=device)
    steps = torch.arange(mask.size(-1), device=device)
    mask.masked_fill_(steps < (steps + 1).view(mask.size(-1), 1), 0)
    mask = mask.to(dtype)
    if past > 0:
        mask = torch.cat([torch.zeros(length, past, dtype=dtype, device=device), mask], dim=-1)
    return mask[None, None, :, :].expand(rows, 1, length, length + past)


def expand_mask(mask: Tensor, dtype: torch.dtype, length: int) -> Tensor:
    """Additive mask [b, 1, q, k] of a mask of ones and zeros [b, k]."""
    rows, keys = mask.size()
    inverted = 1.0 - mask[:, None, None, :].expand(rows, 1, length, keys).to(dtype)
    return inverted.masked_fill(inverted.to(torch.bool), torch.finfo(dtype).min)


class RemoteNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(dtype)


class CachedRotary(nn.Module):
    """Keeps cos and sin for the longest sequence seen."""

    def __init__(self, config: RemoteConfig, dim: int) -> None:
        super().__init__()
        self.dim, self.base = dim, config.rope_theta
        inv_freq = 1.0 / (self.base ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._set_cos_sin_cache(config.max_position_embeddings, torch.get_default_dtype())

    def _set_cos_sin_cache(self, length: int, dtype: torch.dtype) -> None:
        self.max_seq_len_cached = length
        steps = torch.arange(length, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        freqs = torch.einsum("i,j->ij", steps, self.inv_freq)
        table = torch.cat((freqs, freqs), dim=-1)
        self.register_buffer("cos_cached", table.cos().to(dtype), persistent=False)
        self.register_buffer("sin_cached", table.sin().to(dtype), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        if seq_len > self.max_seq_len_cached:
            self._set_cos_sin_cache(seq_len, x.dtype)
        cos = self.cos_cached[:seq_len].to(dtype=x.dtype)
        sin = self.sin_cached[:seq_len].to(dtype=x.dtype)
        return cos[position_ids], sin[position_ids]


class ComputedRotary(nn.Module):
    """Computes cos and sin in each forward, with autocast turned off around it."""

    def __init__(self, config: RemoteConfig, dim: int) -> None:
        super().__init__()
        inv_freq = 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.int64) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1)
        positions = position_ids[:, None, :].float()
        kind = x.device.type
        kind = kind if isinstance(kind, str) and kind != "mps" else "cpu"
        with torch.autocast(device_type=kind, enabled=False):
            freqs = (inv_freq.float() @ positions.float()).transpose(1, 2)
            table = torch.cat((freqs, freqs), dim=-1)
            cos, sin = table.cos(), table.sin()
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


class DynamicRotary(CachedRotary):
    """Another base once a sequence is longer than the model was made for."""

    def _set_cos_sin_cache(self, length: int, dtype: torch.dtype) -> None:
        if hasattr(self, "max_seq_len_cached"):
            base = self.base * (2 * length / 64 - 1) ** (self.dim / (self.dim - 2))
            steps = torch.arange(0, self.dim, 2, device=self.inv_freq.device).float()
            self.register_buffer("inv_freq", 1.0 / (base ** (steps / self.dim)), persistent=False)
        super()._set_cos_sin_cache(length, dtype)


ROTARY = {"cached": CachedRotary, "computed": ComputedRotary, "dynamic": DynamicRotary}


def rotate_half(x: Tensor) -> Tensor:
    """The second half, negated, before the first."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def repeat_kv(x: Tensor, repeats: int) -> Tensor:
    """Each head of keys or values for the query heads that share it."""
    rows, heads, length, dim = x.shape
    if repeats == 1:
        return x
    x = x[:, :, None, :, :].expand(rows, heads, repeats, length, dim)
    return x.reshape(rows, heads * repeats, length, dim)


class RemoteAttention(nn.Module):
    """Attention with queries, keys and values packed by group."""

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__()
        self.hidden_size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.kv_heads = config.num_key_value_heads
        self.groups = self.num_heads // self.kv_heads
        if self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(f"hidden_size must be divisible by num_heads, got {config}")
        width = (self.num_heads + 2 * self.kv_heads) * self.head_dim
        self.wqkv = nn.Linear(self.hidden_size, width, bias=config.bias)
        self.wo = nn.Linear(self.num_heads * self.head_dim, self.hidden_size, bias=config.bias)
        self.rotary_emb = ROTARY[config.rotary](config, self.head_dim)

    def forward(
        self, x: Tensor, mask: Tensor, position_ids: Tensor, past: Past | None, use_cache: bool
    ) -> tuple[Tensor, Past | None]:
        rows, length, _ = x.size()
        packed = self.wqkv(x)
        # "b q (h gs d) -> b q h gs d"
        packed = packed.view(rows, length, -1, 2 + self.groups, self.head_dim)
        query = packed[..., : self.groups, :]
        # "b q h gs d -> b q (h gs) d"
        query = query.reshape(rows, length, -1, self.head_dim)
        key, value = packed[..., -2, :], packed[..., -1, :]
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        kv_length = key.shape[-2]
        if past is not None:
            kv_length += past[0].shape[-2]
        cos, sin = self.rotary_emb(value, position_ids, seq_len=kv_length)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        query = (query * cos) + (rotate_half(query) * sin)
        key = (key * cos) + (rotate_half(key) * sin)
        if past is not None:
            key = torch.cat([past[0], key], dim=2)
            value = torch.cat([past[1], value], dim=2)
        present = (key, value) if use_cache else None
        key, value = repeat_kv(key, self.groups), repeat_kv(value, self.groups)
        weights = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.head_dim)
        if weights.size() != (rows, self.num_heads, length, kv_length):
            raise ValueError(f"attention weights have size {weights.size()}")
        if mask.size() != (rows, 1, length, kv_length):
            raise ValueError(f"the attention mask has size {mask.size()}")
        weights = weights + mask
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
        out = torch.matmul(weights, value).transpose(1, 2).contiguous()
        return self.wo(out.reshape(rows, length, self.hidden_size)), present


class RemoteMLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w3 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class RemoteLayer(nn.Module):
    """Attention and feed-forward, each around a residual."""

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__()
        self.attention, self.feed_forward = RemoteAttention(config), RemoteMLP(config)
        self.attention_norm = RemoteNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RemoteNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, mask: Tensor, position_ids: Tensor, past: Past | None, use_cache: bool
    ) -> tuple[Any, ...]:
        residual = x
        x, present = self.attention(self.attention_norm(x), mask, position_ids, past, use_cache)
        x = residual + x
        x = x + self.feed_forward(self.ffn_norm(x))
        return (x, present) if use_cache else (x,)


class RemoteModel(nn.Module):
    """The decoder."""

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.tok_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id
        )
        self.layers = nn.ModuleList(RemoteLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RemoteNorm(config.hidden_size, config.rms_norm_eps)

    def _mask(self, given: Tensor | None, embeds: Tensor, past: int) -> Tensor:
        combined = None
        if embeds.shape[1] > 1:
            shape = embeds.shape[:2]
            combined = make_causal_mask(shape, embeds.dtype, embeds.device, past)
        if given is not None:
            expanded = expand_mask(given, embeds.dtype, embeds.shape[1]).to(embeds.device)
            combined = expanded if combined is None else expanded + combined
        assert combined is not None
        return combined

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: tuple[Past, ...] | None,
        inputs_embeds: Tensor | None,
        use_cache: bool,
    ) -> tuple[Tensor, tuple[Past, ...] | None]:
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("input_ids and inputs_embeds cannot both be given")
        if inputs_embeds is None:
            inputs_embeds = self.tok_embeddings(input_ids)
        rows, length = inputs_embeds.shape[:2]
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if position_ids is None:
            device = inputs_embeds.device
            position_ids = torch.arange(past, length + past, dtype=torch.long, device=device)
            position_ids = position_ids.unsqueeze(0)
        if attention_mask is None:
            attention_mask = torch.ones(
                (rows, length + past), dtype=torch.bool, device=inputs_embeds.device
            )
        mask = self._mask(attention_mask, inputs_embeds, past)
        hidden = inputs_embeds
        if self.gradient_checkpointing and self.training and use_cache:
            use_cache = False
        presents: tuple[Past, ...] = ()
        for index, layer in enumerate(self.layers):
            before = past_key_values[index] if past_key_values is not None else None
            if self.gradient_checkpointing and self.training:

                def body(*inputs: Any, layer: nn.Module = layer) -> Any:
                    return layer(*inputs, None, False)

                outputs = torch.utils.checkpoint.checkpoint(body, hidden, mask, position_ids)
            else:
                outputs = layer(hidden, mask, position_ids, before, use_cache)
            hidden = outputs[0]
            if use_cache:
                presents += (outputs[1],)
        return self.norm(hidden), presents if use_cache else None


class RemoteForCausalLM(nn.Module):
    """The decoder with a head and a loss."""

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__()
        self.config, self.model = config, RemoteModel(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: tuple[Past, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Output:
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        hidden, presents = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache
        )
        logits = self.output(hidden).float()
        loss = None
        if labels is not None:
            shifted = logits[..., :-1, :].contiguous().view(-1, self.config.vocab_size)
            wanted = labels[..., 1:].contiguous().view(-1).to(shifted.device)
            loss = CrossEntropyLoss()(shifted, wanted)
        return Output(loss, logits, presents)
