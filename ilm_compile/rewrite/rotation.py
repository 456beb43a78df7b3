"""Reading a rotary rotation out of the calls that compute it, in the two forms that models use.

* Hugging Face: x * cos + cat(-second half, first half) * sin, with tables as wide as a head. The
  fused op takes tables of half that width, so both halves of a table must be the same; that is
  proven by finding the cat(f, f) that made it. GPT-NeoX and Phi-3 turn the first numbers of a head
  and append the rest.
* `ilm_compile.models.rotary.rotate`: cat(first * cos - second * sin, second * cos + first * sin),
  with tables of half the width; InternLM2 may sort even before odd numbers first.

Shapes in this file: x (batch, seq, heads, head_dim), or with heads and seq in each other's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ilm_compile.program.arguments import argument
from ilm_compile.rewrite.fusion import (
    args,
    aten,
    dtype,
    is_call,
    only_user,
    other_operand,
    shape,
)

# Calls that treat all numbers of the last dimension alike.
ALIKE = (
    *(aten.to.dtype, aten.detach.default, aten.clone.default, aten.contiguous.default),
    *(aten.cos.default, aten.sin.default, aten.neg.default),
)
BY_NUMBER = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True, slots=True)
class Rotation:
    """One value turned by one pair of tables; `x` and `result` have one shape and dtype."""

    x: fx.Node
    result: fx.Node
    cos: fx.Node  # (batch or 1, seq, 1, width), or with the 1 before seq
    sin: fx.Node
    heads_dim: int  # of x: 1 or 2
    is_doubled: bool  # width is the number of turned numbers, not half of it
    unsorted: fx.Node | None = None  # what x was sorted from: its numbers are 0, 2, ..., 1, 3, ...


def read_rotation(node: fx.Node) -> Rotation | str | None:
    """Return the rotation whose core is the cat `node`, why it is none, or None if far from one."""
    parts = args(node)[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    first, second = parts
    if is_call(first, aten.neg.default):
        return _hugging_face(node, args(first)[0], second)
    if is_call(first, aten.sub.Tensor) and is_call(second, aten.add.Tensor):
        return _written_out(node, first, second)
    return None


def _hugging_face(cat: fx.Node, second: fx.Node, first: fx.Node) -> Rotation | str | None:
    x, halves = _halves(first, second)
    if x is None:
        return None
    if len(set(halves)) != 1 or not _is_last(cat):
        return f"it turns {' and '.join(map(str, halves))} numbers, expected two halves of a head"
    by_sin = only_user(cat)
    total: Any = only_user(by_sin) if is_call(by_sin, aten.mul.Tensor) else None
    if not is_call(total, aten.add.Tensor):
        return "its turned half is not multiplied and added to the other product"
    by_cos = other_operand(total, by_sin)
    if not is_call(by_cos, aten.mul.Tensor) or x not in args(by_cos)[:2]:
        return "its sum holds no product of the value and a table"
    cos, sin = other_operand(by_cos, x), other_operand(by_sin, cat)
    whole, result = _with_rest(x, total)
    return _finished(whole, result, cos, sin, is_doubled=True)


def _written_out(cat: fx.Node, difference: fx.Node, total: fx.Node) -> Rotation | str | None:
    products = (*args(difference)[:2], *args(total)[:2])
    if not all(is_call(product, aten.mul.Tensor) for product in products) or not _is_last(cat):
        return None
    for first, cos in _both_orders(products[0]):
        for second, sin in _both_orders(products[1]):
            x, _ = _halves(first, second)
            crossed = {frozenset((second, cos)), frozenset((first, sin))}
            if x is not None and crossed == {frozenset(args(p)[:2]) for p in products[2:]}:
                return _finished(x, cat, cos, sin, is_doubled=False)
    return None


def _both_orders(product: fx.Node) -> list[tuple[Any, Any]]:
    a, b = args(product)[:2]
    return [(a, b), (b, a)]


def _halves(first: Any, second: Any) -> tuple[fx.Node | None, tuple[int, int]]:
    """Return what two slices are the first and the last numbers of, and how many these are."""
    if not all(is_call(half, aten.slice.Tensor) for half in (first, second)):
        return None, (0, 0)
    x, sizes = args(first)[0], (shape(first)[-1], shape(second)[-1])
    runs = [_run(half) for half in (first, second)]
    if args(second)[0] is not x or runs != [(0, sizes[0]), (sizes[0], shape(x)[-1])]:
        return None, sizes
    return x, sizes


def _run(node: fx.Node) -> tuple[int, int] | None:
    """Return (start, end) of a slice of the last dimension without gaps."""
    x = args(node)[0]
    rank, step = len(shape(x)), argument(node, "step")
    if argument(node, "dim") % rank != rank - 1 or step != 1:
        return None
    start, end, _ = slice(argument(node, "start"), argument(node, "end")).indices(shape(x)[-1])
    return start, end


def _is_last(cat: fx.Node) -> bool:
    return bool(argument(cat, "dim") % len(shape(cat)) == len(shape(cat)) - 1)


def _with_rest(x: fx.Node, total: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the whole head and its result where only the first numbers, `x`, are turned."""
    cat = only_user(total)
    if not is_call(cat, aten.cat.default) or not _is_last(cat) or len(args(cat)[0]) != 2:
        return x, total
    turned, rest = args(cat)[0]
    if turned is not total or not is_call(rest, aten.slice.Tensor):
        return x, total
    whole, width = args(rest)[0], shape(x)[-1]
    is_start = x is whole or (
        is_call(x, aten.slice.Tensor) and args(x)[0] is whole and _run(x) == (0, width)
    )
    is_rest = _run(rest) == (width, shape(whole)[-1])
    return (whole, cat) if is_start and is_rest else (x, total)


def _finished(
    x: fx.Node, result: fx.Node, cos: Any, sin: Any, *, is_doubled: bool
) -> Rotation | str:
    """Check shapes and dtypes, and take in a cast back to the dtype of `x`."""
    if not isinstance(cos, fx.Node) or not isinstance(sin, fx.Node) or shape(cos) != shape(sin):
        return "its tables are not two tensors of one shape"
    heads_dim = _heads_dim(x, cos)
    if heads_dim is None:
        return f"its tables {list(shape(cos))} are not one row per token of {list(shape(x))}"
    if is_doubled and not (is_two_alike(cos) and is_two_alike(sin)):
        return "its tables are not proven to be two equal halves"
    cast = only_user(result)
    if dtype(result) != dtype(x) and is_call(cast, aten.to.dtype):
        result = cast
    if dtype(result) != dtype(x):
        return f"it gives {dtype(result)} of {dtype(x)}, the fused op gives what it is given"
    return Rotation(x, result, cos, sin, heads_dim, is_doubled, _unsorted(x))


def _heads_dim(x: fx.Node, table: fx.Node) -> int | None:
    """Return the dimension of x that a table (batch or 1, ..., width) repeats over: its heads."""
    if len(shape(x)) != 4 or len(shape(table)) != 4 or shape(table)[0] not in (1, shape(x)[0]):
        return None
    for heads, tokens in ((2, 1), (1, 2)):
        if shape(table)[heads] == 1 and shape(table)[tokens] == shape(x)[tokens]:
            return heads
    return None


def _unsorted(x: fx.Node) -> fx.Node | None:
    """Return what `x` sorts into even and then odd numbers of the last dimension."""
    if not is_call(x, aten.cat.default) or not _is_last(x) or len(args(x)[0]) != 2:
        return None
    even, odd = args(x)[0]
    if not all(is_call(part, aten.slice.Tensor) for part in (even, odd)):
        return None
    source: fx.Node = args(even)[0]
    rank = len(shape(source))
    for part, start in ((even, 0), (odd, 1)):
        bounds = slice(*(argument(part, name) for name in ("start", "end", "step")))
        wanted = range(start, shape(source)[-1], 2)
        is_last = argument(part, "dim") % rank == rank - 1
        if args(part)[0] is not source or not is_last:
            return None
        if range(*bounds.indices(shape(source)[-1])) != wanted:
            return None
    return source


def is_two_alike(table: fx.Node) -> bool:
    """Whether the last dimension of `table` is some numbers twice, by how it is computed."""
    node = table
    while isinstance(node, fx.Node) and node.op == "call_function":
        if is_call(node, aten.cat.default) and _is_last(node):
            parts = args(node)[0]
            return len(parts) == 2 and parts[0] is parts[1]
        if is_call(node, aten.unsqueeze.default):
            alike = args(node)[1] % len(shape(node)) != len(shape(node)) - 1
        else:
            by_number = is_call(node, *BY_NUMBER) and isinstance(args(node)[1], (int, float))
            alike = is_call(node, *ALIKE) or by_number
        if not alike:
            return False
        node = args(node)[0]
    return False
