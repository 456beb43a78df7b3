"""Attention: one sequence of R tokens, N the width of the queries."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.gpu.ops.op import KernelOp, Maker, Tensors
from benchmarks.gpu.ops.rotations import heads
from ilm_compile import kernels

WIDTHS = (64, 768, 2048)
MIN_ROWS, MAX_ROWS = 12, 517  # one or two keys may leave a query next to no gradient
# What computes attention rounds the probabilities too, to the dtype of the values.
SLACK = 3.0


def attention(*, packed: bool = False) -> KernelOp:
    """packed: several documents, which do not see one another."""

    def inputs(make: Maker, rows: int, width: int) -> Tensors:
        shape = heads(rows, width)
        found = {"q": make.normal(shape.batch, shape.seq, shape.query, shape.dim)}
        for name in ("k", "v"):
            found[name] = make.normal(shape.batch, shape.seq, shape.key, shape.dim)
        if packed:
            starts = [0, shape.seq // 3, shape.seq // 2, shape.seq]
            starts_of_rows = torch.tensor([starts] * shape.batch, dtype=torch.int32)
            found["cu_seqlens"] = starts_of_rows.to(make.device)
        return found

    return KernelOp(
        inputs=inputs,
        fused=lambda t: (kernels.attention(t["q"], t["k"], t["v"], t.get("cu_seqlens")),),
        plain=_plain,
        outputs=("y",),
        trained=("q", "k", "v"),
        kept=("q", "k", "v", "y"),
        written=("q", "k", "v"),
        widths=WIDTHS,
        min_rows=MIN_ROWS,
        max_rows=MAX_ROWS,
        slack=SLACK,
        has_expanded=False,
    )


def _plain(t: Tensors) -> tuple[torch.Tensor, ...]:
    q, k, v = (t[name].transpose(1, 2) for name in ("q", "k", "v"))
    mask = None
    if "cu_seqlens" in t:
        token = torch.arange(q.shape[2], device=q.device)
        document = (token[None, :, None] >= t["cu_seqlens"][:, None, :]).sum(-1)
        mask = (document[:, :, None] == document[:, None, :]) & (token[:, None] >= token)
        mask = mask.unsqueeze(1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return (out.transpose(1, 2),)
