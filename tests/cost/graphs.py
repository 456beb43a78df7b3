"""Graphs that the cost tests count: torch.export of small modules on the meta device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

BATCH, SEQ, HIDDEN, HEADS, KV_HEADS, FFN, VOCAB = 2, 16, 32, 4, 2, 48, 64


class Llama(nn.Module):
    """Embedding, one block with grouped-query attention and SwiGLU, head and loss."""

    def __init__(self) -> None:
        super().__init__()
        kv_dim = HIDDEN * KV_HEADS // HEADS
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.norm = nn.RMSNorm(HIDDEN)
        self.q = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k = nn.Linear(HIDDEN, kv_dim, bias=False)
        self.v = nn.Linear(HIDDEN, kv_dim, bias=False)
        self.o = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate = nn.Linear(HIDDEN, FFN, bias=False)
        self.up = nn.Linear(HIDDEN, FFN, bias=False)
        self.down = nn.Linear(FFN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection, heads in ((self.q, HEADS), (self.k, KV_HEADS), (self.v, KV_HEADS))
        )
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attend(self.norm(x))
        x = x + self.down(silu(self.gate(x)) * self.up(x))
        return cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Apply(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def export(module: nn.Module, *inputs: Tensor) -> fx.Graph:
    return torch.export.export(module, inputs, strict=False).graph


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def node_of(function: Callable[..., Any], *inputs: Tensor) -> fx.Node:
    """Return the last call in the graph of `function`."""
    return [n for n in export(Apply(function), *inputs).nodes if n.op == "call_function"][-1]


def llama() -> fx.Graph:
    tokens = meta(BATCH, SEQ, dtype=torch.long)
    with torch.device("meta"):
        return export(Llama(), tokens, tokens)
