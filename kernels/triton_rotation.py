"""What the rotary kernels share: tiles of tokens and heads, their angles, the rotation itself.

A program turns a tile of tokens and slots; a slot is a head of whichever tensor. It finds the
angles of its tokens once, by row or by position, and computes in float32 from the moment a number
is loaded. Sizes of the model are constexprs; the numbers of tokens are not, nor are they
specialised, so that no sequence length compiles anew. Indices become int64 before they meet a
stride.

Shapes in this file: tiles are (TOKENS, HEADS, columns of a head); B, S, D, W as in rotation.py.
"""

# Triton types neither its decorator nor what a kernel sees of its arguments.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Numbers of each half of the pairs that a program holds: two 128-bit loads a thread at 16 bits.
ELEMENTS = 1024
MAX_COPIED = 8 * ELEMENTS  # numbers that no pair has: they pass through registers too
WARPS = 4
# Arguments that change from call to call and that no wide load depends on.
COUNTS = ["num_tokens", "seq", "num_positions", "position_batch_stride", "position_stride"]
MAX_HEADS = 8  # in a tile: more would leave wide heads one token only


class Tile(NamedTuple):
    """The constexprs of a tile, by the names the kernels have for them."""

    PAIRS: int
    REST: int
    TOKENS: int
    HEADS: int
    BLOCK: int
    REST_BLOCK: int

    def programs(self, num_tokens: int, slots: int) -> int:
        """How many programs cover `slots` heads of every token."""
        return int(triton.cdiv(num_tokens, self.TOKENS) * triton.cdiv(slots, self.HEADS))


def tile_for(pairs: int, head_dim: int, slots: int) -> Tile:
    """The tile for `slots` heads of which `pairs` pairs turn."""
    rest = head_dim - 2 * pairs
    block, rest_block = (triton.next_power_of_2(max(n, 1)) for n in (pairs, rest))
    rows = max(min(ELEMENTS // block, MAX_COPIED // rest_block), 1)
    heads = min(triton.next_power_of_2(slots), MAX_HEADS, rows)
    return Tile(pairs, rest, rows // heads, heads, block, rest_block)


def addressable(x: Tensor) -> Tensor:
    """x with its last dim laid out number by number, as the kernels read it: a copy if need be."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor) -> list[int]:
    """Strides of all dims but the last. Those of dims of size 1 are 0: torch leaves them undefined,
    and a number that 16 does not divide would compile a kernel with narrow loads."""
    return [
        0 if n == 1 else stride for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    ]


def angle_arguments(cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
    """The arguments of `angles` by name: cos, sin (B or 1, S, W), or (T, W) with position_ids."""
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    batch_stride, row_stride = ([0] if position_ids is not None else []) + strides(cos)
    given = (0, 0) if position_ids is None else strides(position_ids.unsqueeze(-1))
    return {
        "cos": cos,
        "sin": sin,
        "positions": position_ids,
        "num_positions": cos.shape[0],
        "batch_stride": batch_stride,
        "row_stride": row_stride,
        "position_batch_stride": given[0],
        "position_stride": given[1],
    }


@triton.jit
def angles(
    cos,
    sin,
    positions,
    batch,
    token,
    num_positions,
    batch_stride,
    row_stride,
    position_batch_stride,
    position_stride,
    inside,
    PAIRS: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cosines and sines (TOKENS, 1, BLOCK) of tokens `token` (TOKENS, 1, 1) of rows `batch`."""
    pair = tl.arange(0, BLOCK)[None, None, :]
    mask = inside & (pair < PAIRS)
    if positions is None:
        place = batch * batch_stride + token * row_stride
    else:
        place = batch * position_batch_stride + token * position_stride
        row = tl.load(positions + place, mask=inside, other=0).to(tl.int64)
        known = (row >= 0) & (row < num_positions)
        place = row * row_stride
        mask = mask & known
    c = tl.load(cos + place + pair, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + place + pair, mask=mask, other=0.0).to(tl.float32)
    if positions is not None:
        c = tl.where(known, c, float("nan"))  # a position outside the table must be seen
    if BACKWARD:
        s = -s
    return c, s


@triton.jit
def turn(
    source,
    target,
    mask,
    turns,
    c,
    s,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Turn heads from pointers `source` (TOKENS, HEADS, 1) to `target`; copy where not `turns`."""
    dtype: tl.constexpr = target.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, None, :]
        inside = mask & (column < 2 * PAIRS)
        x = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (TOKENS, HEADS, BLOCK, 2)))
    else:
        pair = tl.arange(0, BLOCK)[None, None, :]
        inside = mask & (pair < PAIRS)
        a = tl.load(source + pair, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + PAIRS + pair, mask=inside, other=0.0).to(tl.float32)
    turned_a = a * c - b * s
    turned_b = b * c + a * s
    if turns is not None:
        turned_a = tl.where(turns, turned_a, a)
        turned_b = tl.where(turns, turned_b, b)
    if INTERLEAVED:
        x = tl.reshape(tl.join(turned_a, turned_b), (TOKENS, HEADS, 2 * BLOCK))
        tl.store(target + column, x.to(dtype), mask=inside)
    else:
        tl.store(target + pair, turned_a.to(dtype), mask=inside)
        tl.store(target + PAIRS + pair, turned_b.to(dtype), mask=inside)
    if REST > 0:
        column = tl.arange(0, REST_BLOCK)[None, None, :]
        inside = mask & (column < REST)
        x = tl.load(source + 2 * PAIRS + column, mask=inside)
        tl.store(target + 2 * PAIRS + column, x, mask=inside)


@triton.jit
def place(num_tokens, seq, SLOTS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """This program's tokens, their rows and places in them, (TOKENS, 1, 1), and slots of heads."""
    tiles: tl.constexpr = (SLOTS + HEADS - 1) // HEADS
    program = tl.program_id(0)
    index = program // tiles * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    slot = program % tiles * HEADS + tl.arange(0, HEADS)[None, :, None]
    batch, token = (index // seq).to(tl.int64), (index % seq).to(tl.int64)
    return index.to(tl.int64), batch, token, slot.to(tl.int64), index < num_tokens
