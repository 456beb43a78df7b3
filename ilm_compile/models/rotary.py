"""Rotary positions (RoFormer, arXiv:2104.09864) as pure functions of the position ids.

The tables hold no state and no parameters, so a pipeline stage can compute its own. They are
float32, or float64 in a float64 model.
"""

import torch
from torch import Tensor

from ilm_compile.kernels.attention import document_starts


def default_positions(input_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Positions that count from 0 in every document: (1, seq), or (batch, seq) when packed.

    input_ids: (batch, seq). cu_seqlens as in `ilm_compile.kernels.attention`.
    """
    batch, seq = input_ids.shape
    if cu_seqlens is None:
        return torch.arange(seq, device=input_ids.device).unsqueeze(0)
    rows = cu_seqlens.reshape(-1, cu_seqlens.shape[-1])
    num_tokens = batch * seq // rows.shape[0]
    tokens = torch.arange(num_tokens, device=input_ids.device)
    return (tokens - document_starts(rows, num_tokens)).reshape(batch, seq)


def rotary_tables(
    position_ids: Tensor, *, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * base**(-2i / head_dim), i < head_dim / 2.

    position_ids: (batch or 1, seq). dtype: that of the model. Returns two tensors
    (batch or 1, seq, 1, head_dim / 2): the 1 stands for the heads.
    """
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).to(dtype) / head_dim
    angles = position_ids.to(dtype)[:, :, None, None] * torch.pow(base, -exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns number i of each head together with number i + head_dim / 2 (GPT-NeoX halves).

    x: (batch, seq, heads, head_dim). Computed in the dtype of the tables, returned in that of x.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)


def even_then_odd(x: Tensor) -> Tensor:
    """Sorts the last dim from (0, 1, 2, 3, ...) to (0, 2, ..., 1, 3, ...)."""
    return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)
