"""Matrix products, from linear layers to einsum.

A product is written as einsum letters. For a letter that the output keeps, inputs that carry it are
sharded on it and the others are R, since their gradient is a sum over the shards. For a contracted
letter the output is P, and so is an added bias: it must be counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from string import ascii_letters
from typing import Any

from torch import Tensor, fx

from ilm_compile.ops.call import Call, Strategy, aten
from ilm_compile.ops.nodes import shape_of
from ilm_compile.ops.precision import HEAD, PRODUCT
from ilm_compile.ops.spec import Flops, OpSpec, define, spec_of
from ilm_compile.program.linear_loss import output_logits
from ilm_compile.program.placement import P, Placement, R, S
from ilm_compile.program.weight_parts import Product, of_addmm, of_bmm, of_linear, of_matmul, of_mm


def _linear(call: Call) -> tuple[list[str], str]:
    batch = "abcdefg"[: len(call.shape) - 1]
    return [batch + "k", "nk", "n"][: len(call.shapes)], batch + "n"


def _matmul(call: Call) -> tuple[list[str], str]:
    left, right = call.shapes
    if min(len(left), len(right)) < 2:
        return ["", ""], ""
    batch = "abcdefg"[: len(call.shape) - 2]
    ours, theirs = (batch[len(batch) + 2 - len(shape) :] for shape in call.shapes)
    return [ours + "mk", theirs + "kn"], batch + "mn"


def _einsum(call: Call) -> tuple[list[str], str]:
    terms, arrow, output = str(call.args[0]).replace(" ", "").partition("->")
    inputs = terms.split(",")
    named = [len(term.replace("...", "")) for term in inputs]
    repeated = any(len(set(term)) < len(term.replace("...", "")) for term in inputs)
    if not arrow or repeated:
        return [""] * len(inputs), ""
    unused = [letter for letter in ascii_letters if letter not in terms]
    free = max(len(shape) - n for shape, n in zip(call.shapes, named, strict=True))
    spelled = []
    for term, shape, n in zip(inputs, call.shapes, named, strict=True):
        # Dimensions of "..." are aligned at their last one.
        count = len(shape) - n
        spelled.append(term.replace("...", "".join(unused[free - count : free])))
    return spelled, output.replace("...", "".join(unused[:free]))


def product_from(position: int) -> Flops:
    """Return the FLOPs of a matrix product of the arguments `position` and `position + 1`."""

    def forward(node: fx.Node) -> int:
        return 2 * int(node.meta["val"].numel()) * int(shape_of(node.args[position])[-1])

    return Flops(forward, lambda node: node.args[position : position + 2])


def _einsum_flops(node: fx.Node) -> int:
    equation, operands = node.args
    inputs, arrow, result = str(equation).replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, operand in zip(inputs.split(","), operands, strict=True):  # type: ignore[arg-type]
        leading, _, trailing = term.partition("...")
        shape = shape_of(operand)
        sizes |= dict(zip(leading, shape, strict=False))
        sizes |= dict(zip(reversed(trailing), reversed(shape), strict=False))
    kept = result if arrow else [letter for letter in sizes if inputs.count(letter) == 1]
    contracted = prod(size for letter, size in sizes.items() if letter not in kept)
    num_products = len(operands) - 1  # type: ignore[arg-type]
    return 2 * num_products * int(node.meta["val"].numel()) * contracted


_FIRST, _SECOND = product_from(0), product_from(1)
_EINSUM = Flops(_einsum_flops, lambda node: node.args[1])  # type: ignore[arg-type, return-value]
# The einsum of each product, the input that is added to it and not multiplied, its FLOPs, and the
# gradient of its weight.
PRODUCTS: dict[Any, tuple[Any, int | None, Flops | None, Product | None]] = {
    aten.linear.default: (_linear, 2, _FIRST, Product(0, 1, 2, of_linear)),
    output_logits: (_linear, None, None, None),
    aten.matmul.default: (_matmul, None, _FIRST, Product(0, 1, 2, of_matmul)),
    aten.mm.default: (lambda call: (["mk", "kn"], "mn"), None, _FIRST, Product(0, 1, 2, of_mm)),
    aten.bmm.default: (
        *(lambda call: (["amk", "akn"], "amn"), None, _FIRST),
        Product(0, 1, 3, of_bmm),
    ),
    aten.addmm.default: (
        *(lambda call: (["n", "mk", "kn"], "mn"), 0, _SECOND),
        Product(1, 2, 2, of_addmm),
    ),
    aten.baddbmm.default: (lambda call: (["amn", "amk", "akn"], "amn"), 0, _SECOND, None),
    aten.einsum.default: (_einsum, None, _EINSUM, None),
}


def leaving_weight(op: Any) -> Callable[..., Tensor]:
    """Return the function that stands for a product which leaves the gradient of its weight."""
    weight_part = spec_of(op).weight_part
    assert weight_part
    return weight_part.leave(op)


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the value and the weight of a call that can leave the gradient of its weight."""
    weight_part = spec_of(node.target).weight_part
    assert weight_part
    value, weight = node.args[weight_part.value], node.args[weight_part.weight]
    return value, weight  # type: ignore[return-value]


def product(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Shard on a letter of the einsum: column-wise, row-wise, or by batch and tokens."""
    letters, added, *_ = PRODUCTS[call.target]
    inputs, output = letters(call)
    if any(len(term) != len(shape) for term, shape in zip(inputs, call.shapes, strict=True)):
        return
    for out in wanted:
        if out.is_shard:
            letter, width = output[out.dim], call.shape[out.dim]
            terms = zip(inputs, call.shapes, strict=True)
            yield Strategy(tuple(_operand(t, shape, letter, width, out) for t, shape in terms), out)
    for letter in sorted(set("".join(inputs)) - set(output)):
        others = [P if i == added else R for i in range(len(inputs))]
        terms_and_others = zip(inputs, others, strict=True)
        sharded = [S(t.index(letter)) if letter in t else o for t, o in terms_and_others]
        yield Strategy(tuple(sharded), P)
    for partial in range(len(inputs)):
        if partial != added:
            kinds = [P if i in (partial, added) else R for i in range(len(inputs))]
            yield Strategy(tuple(kinds), P)


def _operand(
    term: str, shape: tuple[int, ...], letter: str, width: int, out: Placement
) -> Placement:
    """Return how an operand is placed when `letter`, `width` wide, is sharded; R if it lacks it."""
    dim = term.find(letter)
    return out.along(dim) if dim >= 0 and shape[dim] == width else R


for _target, (_, _added, _flops, _weight_part) in PRODUCTS.items():
    _spec = OpSpec(
        rule=product,
        flops=_flops,
        precision=HEAD if _target is output_logits else PRODUCT,
        scales="product" if _added is None else "",
        weight_part=_weight_part,
    )
    define(_spec, _target)
define(OpSpec(flops=_FIRST, precision=PRODUCT), aten.mm.dtype, aten.bmm.dtype)
define(OpSpec(flops=_SECOND, precision=PRODUCT), aten.addmm.dtype, aten.baddbmm.dtype)
