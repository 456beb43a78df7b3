"""Dropout whose random numbers depend on the seed and an element's position, on nothing else.

torch's dropout draws from a stream, so every plan would drop other elements. Here the mask of a
micro-batch is a function of its seed and of the place of the dropout in the model, drawn for the
whole tensor; each rank uses its shard of it. Recomputing a block draws the same mask again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.program.bound import fresh
from ilm_compile.program.communicator import communicator
from ilm_compile.program.functions import graph_function
from ilm_compile.program.layout import Layout, Place

SEED = "dropout_seed"  # the placeholder that receives the seed of a micro-batch
SALT = 3  # position among the arguments of `seeded_dropout`
aten = torch.ops.aten


torch.library.define(
    "ilm::dropout_mask",
    "(Tensor x, Tensor seed, float probability, Tensor salt, str layout, int[] sizes,"
    " int[] ranks) -> Tensor",
)


@graph_function()
def seeded_dropout(
    x: Tensor,
    seed: Tensor,
    probability: float,
    salt: int | Tensor,
    layout: str,
    axes: Mapping[str, str] | None = None,
) -> Tensor:
    """Return `x` with elements zeroed with `probability` and the others scaled to keep the mean.

    x: rank-local, placed as `layout` says. seed: int64 scalar on the CPU, of the
    micro-batch; `salt` tells the dropouts of a model apart. axes: the communicators of a bound
    graph, by axis.
    """
    cut = [axis for axis, placement in Layout.parse(layout).placed if placement.is_shard]
    found = [communicator(axes[axis] if axes else axis) for axis in cut]
    sizes, ranks = [each.size for each in found], [each.rank for each in found]
    kept = torch.ops.ilm.dropout_mask(
        x.detach(), seed, probability, torch.as_tensor(salt, device="cpu"), layout, sizes, ranks
    )
    result: Tensor = x * kept / (1 - probability) if probability < 1 else x * 0.0
    return result


def _kept(
    x: Tensor,
    seed: Tensor,
    probability: float,
    salt: Tensor,
    layout: str,
    sizes: Sequence[int],
    ranks: Sequence[int],
) -> Tensor:
    """Return this rank's part of the mask. sizes, ranks: of the axes that cut `x`, in order."""
    whole = Layout.parse(layout)
    cut = [axis for axis, placement in whole.placed if placement.is_shard]
    place = Place(dict(zip(cut, sizes, strict=True)), dict(zip(cut, ranks, strict=True)))
    generator = torch.Generator(device=x.device).manual_seed(hash((int(seed), int(salt))) % 2**63)
    shape = whole.global_shape(x.shape, place.sizes)
    # Not in the default dtype, under which other numbers would be drawn.
    drawn = torch.rand(shape, generator=generator, device=x.device, dtype=torch.float32)
    return fresh(whole.cut(drawn >= probability, place), x)


def _kept_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bool)


torch.library.impl("ilm::dropout_mask", ("cpu", "cuda"), _kept)
torch.library.register_fake("ilm::dropout_mask", _kept_fake)


def attention_probabilities(
    emit: Any, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[fx.Node, fx.Node]:
    """Return (probabilities, values) of a scaled_dot_product_attention written out in plain ops.

    Dropout inside the fused op would draw its own random numbers; so it is taken apart, as torch's
    documentation of the op spells it.
    """
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, args[3:], strict=False)) | kwargs
    query, key, value = args[:3]
    like = query.meta["val"]
    if given.get("enable_gqa"):
        key, value = (_repeat(emit, node, x, like.shape[-3]) for x in (key, value))
    rows, columns = like.shape[-2], key.meta["val"].shape[-2]
    turned = key.meta["val"].transpose(-2, -1)
    flipped = emit(node, aten.transpose.int, (key, -2, -1), val=turned)
    shape = (*like.shape[:-1], columns)
    scores = emit(node, aten.matmul.default, (query, flipped), val=like.new_empty(shape))
    scale = given.get("scale") or 1 / math.sqrt(like.shape[-1])
    scores = emit(node, aten.mul.Tensor, (scores, scale), val=like.new_empty(shape))
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = _causal(emit, node, rows, columns)
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        hidden = emit(node, aten.logical_not.default, (mask,), val=mask.meta["val"])
        call = (scores, hidden, -math.inf)
        scores = emit(node, aten.masked_fill.Scalar, call, val=like.new_empty(shape))
    elif mask is not None:
        scores = emit(node, aten.add.Tensor, (scores, mask), val=like.new_empty(shape))
    weights = emit(node, aten.softmax.int, (scores, -1), val=like.new_empty(shape))
    return weights, value


def _causal(emit: Any, node: fx.Node, rows: int, columns: int) -> fx.Node:
    ones = torch.empty((rows, columns), dtype=torch.bool, device="meta")
    whole = emit(node, aten.ones.default, ([rows, columns],), {"dtype": torch.bool}, val=ones)
    return emit(node, aten.tril.default, (whole,), val=ones)  # type: ignore[no-any-return]


def _repeat(emit: Any, node: fx.Node, x: fx.Node, heads: int) -> fx.Node:
    """Return keys or values with each head repeated for the query heads that share it."""
    val = x.meta["val"]
    *outer, kv_heads, length, width = val.shape
    repeats = heads // kv_heads
    split = [*outer, kv_heads, repeats, length, width]
    merged = [*outer, heads, length, width]
    x = emit(node, aten.unsqueeze.default, (x, -3), val=val.unsqueeze(-3))
    x = emit(node, aten.expand.default, (x, split), val=val.new_empty(split))
    return emit(node, aten.reshape.default, (x, merged), val=val.new_empty(merged))  # type: ignore[no-any-return]
