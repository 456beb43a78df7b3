"""The fused ops of `ilm_compile.kernels`, and taking one result of several.

An op with several results has one placement, that of each of them (`ilm_compile.program.values`).
No fused op is linear in its inputs and keeps them apart from each other, so partial sums are made
whole before it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch

import ilm_compile.kernels  # noqa: F401 - registers the ops
from ilm_compile.ops.call import Call, Strategy
from ilm_compile.ops.precision import FUSED_1, FUSED_2
from ilm_compile.ops.spec import rule
from ilm_compile.program.placement import Placement, R, S

ilm = torch.ops.ilm
SUMMED = (ilm.add_rms_norm.default, ilm.add_layer_norm.default)


@rule(operator.getitem, carries=True)
def item(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Placed as the results that it is one of."""
    yield from (Strategy((out,), out) for out in wanted if out.is_shard)


@rule(ilm.rms_norm.default, ilm.layer_norm.default, precision=FUSED_1)
@rule(*SUMMED, precision=FUSED_2)
def norm(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """x (..., H), both terms of a sum alike, weight and bias (H,): any dimension but the last."""
    num_values = 2 if call.target in SUMMED else 1
    for out in wanted:
        if out.is_shard and out.dim < len(call.shape) - 1:
            weights = (R for _ in call.shapes[num_values:])
            yield Strategy((*(out for _ in range(num_values)), *weights), out)


@rule(ilm.rotary.default, precision=FUSED_2)
@rule(ilm.qkv_rotary.default, precision=FUSED_1)
def rotary(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """(batch, seq, heads, ...): by batch, by sequence, or by heads, queries and keys alike.

    By heads the ranks must divide the key heads: a rank's queries and keys lie in one placement.
    Tables (batch or 1, seq, pairs) are cut with the tokens that they speak of; with positions they
    are (positions, pairs), and the positions (batch or 1, seq) are cut.
    """
    num_values = 2 if call.target is ilm.rotary.default else 1
    rows = call.shapes[num_values:]
    has_positions = len(rows) == 3
    for out in {S(0), S(1), S(2)} | {out for out in wanted if out.is_shard and out.dim < 3}:
        along = [
            _table(shape, out, call.shape[0], by_token=not has_positions or index == 2)
            for index, shape in enumerate(rows)
        ]
        yield Strategy((*(out for _ in range(num_values)), *along), out)


def _table(shape: tuple[int, ...], out: Placement, batch: int, *, by_token: bool) -> Placement:
    """Return how a table or the positions lie when the tokens are cut as `out`."""
    is_cut = by_token and (out.dim == 1 or (out.dim == 0 and shape[0] == batch > 1))
    return out if is_cut else R


@rule(ilm.glu.default, precision=FUSED_2)
def glu(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Elementwise: sharded as wanted, both inputs alike."""
    yield from (Strategy((out, out), out) for out in wanted if out.is_shard)
