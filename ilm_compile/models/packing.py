"""The fused query-key-value matrices of InternLM and InternLM2, taken apart and put together.

Separate matrices have the layout that Hugging Face uses: heads one after the other, and inside a
head the first half of the rotary numbers before the second.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ilm_compile.models.config import InternLM2Config, InternLMConfig

AnyConfig = InternLMConfig | InternLM2Config


class QueryKeyValue(NamedTuple):
    """q: (heads * head_dim, ...); k, v: (kv_heads * head_dim, ...), weights or biases."""

    q: Tensor
    k: Tensor
    v: Tensor


def unpack_qkv(config: AnyConfig, fused: Tensor) -> QueryKeyValue:
    """Separate matrices (or biases) from a fused one, its rows in dim 0."""
    if isinstance(config, InternLMConfig):
        return QueryKeyValue(*fused.chunk(3))
    groups = _split_rows(fused, config.num_kv_attention_heads, -1, config.head_dim)
    q, k, v = (x.flatten(0, 2) for x in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:]))
    if not config.adapt_hf:
        q, k = (_swap(x, config.head_dim // 2, 2) for x in (q, k))
    return QueryKeyValue(q, k, v)


def pack_qkv(config: AnyConfig, parts: QueryKeyValue) -> Tensor:
    """The inverse of `unpack_qkv`."""
    q, k, v = parts
    if isinstance(config, InternLMConfig):
        return torch.cat((q, k, v))
    if not config.adapt_hf:
        q, k = (_swap(x, 2, config.head_dim // 2) for x in (q, k))
    groups = [_split_rows(x, config.num_kv_attention_heads, -1, config.head_dim) for x in (q, k, v)]
    return torch.cat(groups, dim=1).flatten(0, 2)


def _split_rows(x: Tensor, *sizes: int) -> Tensor:
    return x.reshape(*sizes, *x.shape[1:])


def _swap(x: Tensor, outer: int, inner: int) -> Tensor:
    """Rows of each head, read as an outer by inner table, in the order of its transpose."""
    return _split_rows(x, -1, outer, inner).transpose(1, 2).flatten(0, 2)
