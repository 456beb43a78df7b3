"""The rotary ops. N is the width of the queries: a token has N // D heads of D numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from benchmarks.gpu.ops.op import HIDDEN_SIZES, KernelOp, Maker, Tensors
from ilm_compile import kernels

MAX_SEQ = 4096
KV_HEADS = 8


@dataclass(frozen=True, slots=True)
class Heads:
    """How R tokens are `batch` sequences, and the N numbers of a token heads of `dim`."""

    batch: int
    seq: int
    query: int
    key: int
    dim: int


def heads(rows: int, width: int) -> Heads:
    """Heads of 128 numbers where they divide N, else of 64, else one; at most 8 heads of keys."""
    dim = next(d for d in (128, 64, width) if width % d == 0)
    seq = MAX_SEQ if rows % MAX_SEQ == 0 else rows
    return Heads(rows // seq, seq, width // dim, gcd(width // dim, KV_HEADS), dim)


def rotary(
    *,
    interleaved: bool = False,
    positions: bool = False,
    share: float = 1.0,
    widths: Sequence[int] = HIDDEN_SIZES,
) -> KernelOp:
    """share: of a head's numbers, that turn."""

    def inputs(make: Maker, rows: int, width: int) -> Tensors:
        shape = heads(rows, width)
        q = make.normal(shape.batch, shape.seq, shape.query, shape.dim)
        k = make.normal(shape.batch, shape.seq, shape.key, shape.dim)
        return {"q": q, "k": k, **_tables(make, shape, positions, share)}

    def plain(t: Tensors) -> tuple[Tensor, ...]:
        cos, sin = _plain_tables(t)
        return tuple(_plain_turn(t[name], cos, sin, interleaved) for name in ("q", "k"))

    return KernelOp(
        inputs=inputs,
        fused=lambda t: kernels.rotary(
            t["q"], t["k"], t["cos"], t["sin"], t.get("positions"), interleaved
        ),
        plain=plain,
        outputs=("q turned", "k turned"),
        trained=("q", "k"),
        kept=("cos", "sin", "positions") if positions else ("cos", "sin"),
        written=("q", "k"),
        widths=widths,
    )


def qkv_rotary(
    *, interleaved: bool = False, positions: bool = False, widths: Sequence[int] = HIDDEN_SIZES
) -> KernelOp:
    def inputs(make: Maker, rows: int, width: int) -> Tensors:
        shape = heads(rows, width)
        packed = (shape.batch, shape.seq, shape.key, shape.query // shape.key + 2, shape.dim)
        return {"qkv": make.normal(*packed), **_tables(make, shape, positions, 1.0)}

    def plain(t: Tensors) -> tuple[Tensor, ...]:
        cos, sin = _plain_tables(t)
        q, k, v = torch.split(t["qkv"], [t["qkv"].shape[3] - 2, 1, 1], dim=3)
        q, k = (_plain_turn(x.flatten(2, 3), cos, sin, interleaved) for x in (q, k))
        return q, k, v.squeeze(3).contiguous()

    return KernelOp(
        inputs=inputs,
        fused=lambda t: kernels.qkv_rotary(
            t["qkv"], t["cos"], t["sin"], t.get("positions"), interleaved
        ),
        plain=plain,
        outputs=("q", "k", "v"),
        trained=("qkv",),
        kept=("cos", "sin", "positions") if positions else ("cos", "sin"),
        written=("qkv",),
        widths=widths,
    )


def _tables(make: Maker, shape: Heads, positions: bool, share: float) -> Tensors:
    """cos and sin of each token (1, S, pairs), or tables of positions, and (1, S) of them."""
    pairs = int(shape.dim * share) // 2
    if not positions:
        return {n: table.unsqueeze(0) for n, table in make.angles(shape.seq, pairs).items()}
    count = 2 * shape.seq
    return make.angles(count, pairs) | {"positions": make.integers(count, 1, shape.seq)}


def _plain_tables(t: Tensors) -> tuple[Tensor, Tensor]:
    """(1, S, 1, pairs), float32."""
    cos, sin = (t[n][t["positions"]] if "positions" in t else t[n] for n in ("cos", "sin"))
    return cos.unsqueeze(2), sin.unsqueeze(2)


def _plain_turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    count = 2 * cos.shape[-1]
    turned, rest = x[..., :count], x[..., count:]
    if interleaved:
        a, b = turned.reshape(*turned.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned.to(x.dtype), rest], -1) if rest.shape[-1] else turned.to(x.dtype)
