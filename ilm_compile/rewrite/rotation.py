"""Reading a rotary rotation out of the calls that compute it, in the two forms that models use.

* Hugging Face: x * cos + cat(-second half, first half) * sin, with tables as wide as a head. The
  fused op takes tables of half that width, so both halves of a table must be the same; that is
  proven by finding the cat(f, f) that made it. GPT-NeoX and Phi-3 turn the first numbers of a head
  and append the rest.
* `ilm_compile.models.rotary.rotate`: cat(first * cos - second * sin, second * cos + first * sin),
  with tables of half the width; InternLM2 may sort even before odd numbers first.

In both, GPT-J, Cohere and GLM take the even and odd numbers of a head for its halves: they stack
where others cat, and repeat each number of a table.

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
# Calls that give the same whenever they are given the same, among those that make tables.
PURE = (
    *(aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor),
    *(*ALIKE, *BY_NUMBER),
)


@dataclass(frozen=True, slots=True)
class Rotation:
    """One value turned by one pair of tables; `x` and `result` have one shape and dtype."""

    x: fx.Node
    result: fx.Node
    cos: fx.Node  # (batch or 1, seq, 1, width), or with the 1 before seq
    sin: fx.Node
    heads_dim: int  # of x: 1 or 2
    is_doubled: bool  # width is the number of turned numbers, not half of it
    interleaved: bool  # pairs are neighbours, not half a head apart
    unsorted: fx.Node | None = None  # what x was sorted from: its numbers are 0, 2, ..., 1, 3, ...


def read_rotation(node: fx.Node) -> Rotation | str | None:
    """Return the rotation whose core is the cat or stack `node`, why it is none, or None if far
    from one."""
    parts = args(node)[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    first, second = parts
    joined = node if is_call(node, aten.cat.default) else _flattened(node)
    if joined is None:
        return None
    if is_call(first, aten.neg.default):
        return _hugging_face(node, joined, args(first)[0], second)
    if is_call(first, aten.sub.Tensor) and is_call(second, aten.add.Tensor):
        return _written_out(node, joined, first, second)
    return None


def _flattened(stack: fx.Node) -> fx.Node | None:
    """Return the reshape that makes neighbours of what `stack` pairs up in a new last dim."""
    flat = only_user(stack)
    wanted = (*shape(stack)[:-2], 2 * shape(stack)[-2])
    is_flat = is_call(flat, aten.reshape.default) and shape(flat) == wanted
    return flat if is_flat and _is_last(stack) else None


def _hugging_face(
    core: fx.Node, joined: fx.Node, second: fx.Node, first: fx.Node
) -> Rotation | str | None:
    interleaved = core is not joined
    x, halves = _halves(first, second, interleaved)
    if x is None:
        return None
    if len(set(halves)) != 1 or not _is_last(core):
        return f"it turns {' and '.join(map(str, halves))} numbers, expected two halves of a head"
    by_sin = only_user(joined)
    total: Any = only_user(by_sin) if is_call(by_sin, aten.mul.Tensor) else None
    if not is_call(total, aten.add.Tensor):
        return "its turned half is not multiplied and added to the other product"
    by_cos = other_operand(total, by_sin)
    if not is_call(by_cos, aten.mul.Tensor) or x not in args(by_cos)[:2]:
        return "its sum holds no product of the value and a table"
    cos, sin = other_operand(by_cos, x), other_operand(by_sin, joined)
    return _finished(x, total, cos, sin, {by_cos, first, second}, interleaved, is_doubled=True)


def _written_out(
    core: fx.Node, joined: fx.Node, difference: fx.Node, total: fx.Node
) -> Rotation | str | None:
    interleaved = core is not joined
    products = (*args(difference)[:2], *args(total)[:2])
    if not all(is_call(product, aten.mul.Tensor) for product in products) or not _is_last(core):
        return None
    for first, cos in _both_orders(products[0]):
        for second, sin in _both_orders(products[1]):
            x, _ = _halves(first, second, interleaved)
            crossed = {frozenset((second, cos)), frozenset((first, sin))}
            if x is not None and crossed == {frozenset(args(p)[:2]) for p in products[2:]}:
                inside = {first, second}
                return _finished(x, joined, cos, sin, inside, interleaved, is_doubled=False)
    return None


def _both_orders(product: fx.Node) -> list[tuple[Any, Any]]:
    a, b = args(product)[:2]
    return [(a, b), (b, a)]


def _halves(first: Any, second: Any, interleaved: bool) -> tuple[fx.Node | None, tuple[int, int]]:
    """Return what two slices are the first and the last numbers of, or the even and the odd ones,
    and how many these are."""
    if not all(is_call(half, aten.slice.Tensor) for half in (first, second)):
        return None, (0, 0)
    x, sizes = args(first)[0], (shape(first)[-1], shape(second)[-1])
    width, cut = shape(x)[-1], sizes[0]
    wanted = (range(0, cut), range(cut, width))
    if interleaved:
        wanted = (range(0, width, 2), range(1, width, 2))
    if args(second)[0] is not x or tuple(_run(half) for half in (first, second)) != wanted:
        return None, sizes
    return x, sizes


def _run(node: fx.Node) -> range | None:
    """Return which numbers of the last dimension a slice takes."""
    x = args(node)[0]
    rank = len(shape(x))
    if argument(node, "dim") % rank != rank - 1:
        return None
    bounds = slice(*(argument(node, name) for name in ("start", "end", "step")))
    return range(*bounds.indices(shape(x)[-1]))


def _is_last(joined: fx.Node) -> bool:
    """Whether a cat or stack is along the last dim of its result."""
    return bool(argument(joined, "dim") % len(shape(joined)) == len(shape(joined)) - 1)


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
        is_call(x, aten.slice.Tensor) and args(x)[0] is whole and _run(x) == range(width)
    )
    is_rest = _run(rest) == range(width, shape(whole)[-1])
    return (whole, cat) if is_start and is_rest else (x, total)


def _finished(
    x: fx.Node,
    result: fx.Node,
    cos: Any,
    sin: Any,
    inside: set[fx.Node],
    interleaved: bool,
    *,
    is_doubled: bool,
) -> Rotation | str:
    """Check shapes and dtypes, and take in what is not turned, and casts to and from float32.

    inside: who uses `x` for the rotation.
    """
    x, result = _with_rest(x, result)
    if not isinstance(cos, fx.Node) or not isinstance(sin, fx.Node) or shape(cos) != shape(sin):
        return "its tables are not two tensors of one shape"
    heads_dim = _heads_dim(x, cos)
    if heads_dim is None:
        return f"its tables {list(shape(cos))} are not one row per token of {list(shape(x))}"
    if is_doubled and not all(is_two_alike(table, interleaved) for table in (cos, sin)):
        return "its tables are not proven to be two equal halves"
    cast = only_user(result)
    if is_call(x, aten.to.dtype) and is_call(cast, aten.to.dtype) and inside.issuperset(x.users):
        source = args(x)[0]
        if dtype(source) == dtype(cast):
            x, result = source, cast
    if dtype(result) != dtype(x) and is_call(cast, aten.to.dtype):
        result = cast
    if dtype(result) != dtype(x):
        return f"it gives {dtype(result)} of {dtype(x)}, the fused op gives what it is given"
    return Rotation(x, result, cos, sin, heads_dim, is_doubled, interleaved, _unsorted(x))


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
    return _halves(even, odd, True)[0]


def is_two_alike(table: fx.Node, interleaved: bool = False) -> bool:
    """Whether the last dimension of `table` is some numbers twice, by how it is computed: all and
    then all again, or, interleaved, each and then itself."""
    node = table
    while isinstance(node, fx.Node) and node.op == "call_function":
        if interleaved and is_call(node, aten.reshape.default):
            return _is_repeated(node)
        if not interleaved and is_call(node, aten.cat.default) and _is_last(node):
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


def _is_repeated(node: fx.Node) -> bool:
    """Whether a reshape ends `repeat_interleave(2, -1)`: it flattens a last dim expanded to 2."""
    twice = args(node)[0]
    if not is_call(twice, aten.expand.default):
        return False
    once = args(twice)[0]
    is_flat = shape(twice)[-1] == 2 and shape(node)[-1] == 2 * shape(twice)[-2]
    return is_flat and shape(once) == (*shape(twice)[:-1], 1)


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are equal by how they are computed: GPT-J repeats its tables for q and
    for k."""
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return bool(a is b or (type(a) is type(b) and a == b))
    if not is_call(a, *PURE) or a.target is not b.target or a.kwargs != b.kwargs:
        return False
    return len(a.args) == len(b.args) and all(map(is_same, a.args, b.args))
