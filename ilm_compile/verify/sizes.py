"""Which dimensions of a graph's values have one size by nature, op by op.

The dimensions of all values fall into classes: those of a class grow and shrink together. An op
ties the dimensions of what it takes to those of what it gives; a reshape says that the product of
some sizes is that of others; a slice or an `arange` names positions, which must move along. An op
that no row of the table speaks of keeps all its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ilm_compile.program.placement import Placement
from ilm_compile.program.program import Program
from ilm_compile.program.values import tensors_of
from ilm_compile.sharding.strategy import placement_of, tensor_inputs
from ilm_compile.verify.numbers import ranks_of

aten = torch.ops.aten
Dims = list[int]  # a dimension of a value each, as a number that `Classes` knows
END = 2**62  # a slice bound above it means the end


@dataclass
class Classes:
    """Dimensions by number, tied into classes.

    sizes: of each dimension, global ones. locals: what a rank holds, where it is less. products:
    pairs of lists of dimensions whose sizes have equal products. positions: places along a
    dimension, other than its ends, that something names. scaled: dimensions whose class has sizes
    that are multiples of each other, and must stay so.
    """

    sizes: list[int] = field(default_factory=list)
    locals: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    products: list[tuple[Dims, Dims]] = field(default_factory=list)
    positions: list[tuple[int, int]] = field(default_factory=list)
    scaled: list[int] = field(default_factory=list)

    def add(self, shape: Sequence[int], local: Sequence[int]) -> Dims:
        """Return new dimensions of these sizes."""
        first = len(self.sizes)
        self.sizes += shape
        self.locals += local
        self.parents += range(first, first + len(shape))
        return list(range(first, first + len(shape)))

    def find(self, dim: int) -> int:
        """Return the class of a dimension."""
        while self.parents[dim] != dim:
            self.parents[dim] = self.parents[self.parents[dim]]
            dim = self.parents[dim]
        return dim

    def tie(self, a: int, b: int) -> None:
        """Make two dimensions of one size one class; a padded one keeps its padding."""
        if self.sizes[a] == 1 or self.sizes[b] == 1:  # one is broadcast
            return
        self.parents[self.find(a)] = self.find(b)

    def scale(self, a: int, b: int) -> None:
        """Make one class of dimensions of which one is a multiple of the other."""
        if self.sizes[a] != self.sizes[b]:
            self.scaled += (a, b)
        self.tie(a, b)

    def scale_all(self, left: Sequence[int], right: Sequence[int]) -> None:
        """Likewise, dimension by dimension, from the last one on."""
        for a, b in zip(reversed(left), reversed(right), strict=False):
            self.scale(a, b)

    def tie_all(self, left: Sequence[int], right: Sequence[int]) -> None:
        """Tie dimension by dimension, from the last one on."""
        for a, b in zip(reversed(left), reversed(right), strict=False):
            self.tie(a, b)

    def pin(self, dims: Sequence[int]) -> None:
        """Let dimensions keep their sizes."""
        self.pinned += dims


@dataclass(frozen=True, slots=True)
class View:
    """A call as the table's rows see it: its dimensions, inputs in order, results in order."""

    node: fx.Node
    inputs: list[Dims]
    results: list[Dims]
    classes: Classes
    size: int
    dims: Mapping[fx.Node, list[Dims]]

    @property
    def out(self) -> Dims:
        """The dimensions of the first result."""
        return self.results[0]

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """Return the argument given by position or by name."""
        if len(self.node.args) > index:
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def is_split(self, dim: int) -> bool:
        """Whether the ranks hold less of a dimension of the first input than there is."""
        number = self.inputs[0][dim]
        return self.classes.locals[number] < self.classes.sizes[number]

    def name_position(self, dim: int, position: int) -> None:
        """Note a place along dimension `dim` of the first input; local ones are made global."""
        number = self.inputs[0][dim]
        position = position * self.size if self.is_split(dim) else position
        length = self.classes.sizes[number]
        position = position + length if position < 0 else position
        if 0 < position < length:
            self.classes.positions.append((number, position))


Relation = Callable[[View], None]


def dimensions(classes: Classes, program: Program) -> dict[fx.Node, list[Dims]]:
    """Return the dimensions of every value of `program`, tied as its calls tie them."""
    size = ranks_of(program)
    found: dict[fx.Node, list[Dims]] = {}
    for node in program.graph.nodes:
        values = tensors_of(node.meta.get("val")) if node.op != "output" else ()
        place: Placement = placement_of(node)
        shapes = [tuple(value.shape) for value in values]
        found[node] = [classes.add(place.global_shape(s, size), s) for s in shapes]
        if place.segments:
            ends = [sum(place.segments[: i + 1]) for i in range(len(place.segments) - 1)]
            classes.positions += [(dims[place.dim], end) for dims in found[node] for end in ends]
    for node in program.calls():
        sources = [found[source][0] for source in tensor_inputs(node) if found[source]]
        view = View(node, sources, found[node], classes, size, found)
        relation_of(node)(view) if not is_item(node) else _item(view, found)
    return found


def is_item(node: fx.Node) -> bool:
    """Whether `node` takes one result of several."""
    return getattr(node.target, "__name__", "") == "getitem"


def relation_of(node: fx.Node) -> Relation:
    """Return what is known of an op; that of an unknown one pins everything."""
    name = op_name(node)
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return RELATIONS.get(name) or (_same if is_pointwise else _pin)


def op_name(node: fx.Node) -> str:
    """Return an op's name without overload, or that of a function of ours."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name if schema else getattr(node.target, "__name__", str(node.target))
    return str(name).removeprefix("aten::").removesuffix("_") if schema else str(name)


def _item(view: View, found: dict[fx.Node, list[Dims]]) -> None:
    source, index = view.node.args[0], view.node.args[1]
    view.classes.tie_all(view.out, found[source][index])  # type: ignore[index]


def _pin(view: View) -> None:
    for dims in [*view.inputs, *view.results]:
        view.classes.pin(dims)


def _same(view: View) -> None:
    """All aligned at the last dimension."""
    for result in view.results:
        for dims in view.inputs:
            view.classes.tie_all(dims, result)


def _reduced(index: int, name: str) -> Relation:
    """Dimensions that `index` or `name` lists are gone, or of size one."""

    def relation(view: View) -> None:
        if not view.inputs:
            return
        rank, given = len(view.inputs[0]), view.argument(index, name)
        if given is None or given == []:
            return
        dims = {d % rank for d in ([given] if isinstance(given, int) else given)}
        kept = [d for d in range(rank) if d not in dims]
        if len(view.out) == rank:
            view.classes.tie_all([view.inputs[0][d] for d in kept], [view.out[d] for d in kept])
        elif len(view.out) == len(kept):
            view.classes.tie_all([view.inputs[0][d] for d in kept], view.out)

    return relation


def _linear(view: View) -> None:
    x, weight, *bias = view.inputs
    view.classes.tie(x[-1], weight[-1])
    view.classes.tie_all(x[:-1], view.out[:-1])
    for dims in ([weight[0]] if len(weight) > 1 else [], *bias):
        view.classes.tie_all(dims, view.out[-1:])


def _matmul(view: View) -> None:
    left, right = view.inputs[-2:]
    rows, inner = left[:-1], left[-1]
    if len(right) == 1:
        view.classes.tie(inner, right[0])
        view.classes.tie_all(rows, view.out)
        return
    view.classes.tie(inner, right[-2])
    view.classes.tie(right[-1], view.out[-1])
    if len(left) > 1:
        view.classes.tie(left[-2], view.out[-2])
        view.classes.tie_all(left[:-2], view.out[:-2])
    view.classes.tie_all(right[:-2], view.out[:-2] if len(left) > 1 else view.out[:-1])
    for added in view.inputs[:-2]:  # addmm, baddbmm
        view.classes.tie_all(added, view.out)


def _einsum(view: View) -> None:
    text = str(view.node.args[0]).replace(" ", "")
    if "." in text or "->" not in text:
        return _pin(view)
    terms, result = text.split("->")
    letters: dict[str, int] = {}
    for dims, word in zip([*view.inputs, view.out], [*terms.split(","), result], strict=True):
        for dim, letter in zip(dims, word, strict=True):
            view.classes.tie(dim, letters.setdefault(letter, dim))
    return None


def _permuted(order: Callable[[View, int], Sequence[int]]) -> Relation:
    def relation(view: View) -> None:
        x = view.inputs[0]
        view.classes.tie_all([x[d] for d in order(view, len(x))], view.out)

    return relation


def _transposed(view: View, rank: int) -> list[int]:
    order = list(range(rank))
    a, b = (view.argument(i, n) % rank for i, n in ((1, "dim0"), (2, "dim1")))
    order[a], order[b] = order[b], order[a]
    return order


def _one_more(view: View) -> None:
    at = view.argument(1, "dim") % len(view.out)
    view.classes.tie_all(view.inputs[0], [*view.out[:at], *view.out[at + 1 :]])


def _reshape(view: View) -> None:
    x, out, classes = view.inputs[0], view.out, view.classes
    for left, right in groups([classes.sizes[d] for d in x], [classes.sizes[d] for d in out]):
        ours, theirs = ([x[d] for d in left], [out[d] for d in right])
        ours, theirs = ([d for d in dims if classes.sizes[d] > 1] for dims in (ours, theirs))
        if len(ours) == len(theirs) == 1:
            classes.tie(ours[0], theirs[0])
        elif ours or theirs:
            classes.products.append((ours, theirs))


def groups(left: Sequence[int], right: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the shortest runs of dimensions of two shapes whose sizes have equal products."""
    i = j = 0
    while i < len(left) or j < len(right):
        ours, theirs = [i] if i < len(left) else [], [j] if j < len(right) else []
        a = left[i] if ours else 1
        b = right[j] if theirs else 1
        while a != b:
            if (a < b or not theirs) and ours[-1:] != [len(left) - 1]:
                ours.append(ours[-1] + 1 if ours else i)
                a *= left[ours[-1]]
            else:
                theirs.append(theirs[-1] + 1 if theirs else j)
                b *= right[theirs[-1]]
        yield ours, theirs
        i, j = i + len(ours), j + len(theirs)


def _slice(view: View) -> None:
    dim = view.argument(1, "dim", 0) % len(view.out)
    step = int(view.argument(4, "step", 1))
    for index, name, default in ((2, "start", 0), (3, "end", END)):
        bound = view.argument(index, name, default)
        is_offset = step > 1 and name == "start" and bound is not None and 0 <= bound < step
        if bound is not None and bound < END and not is_offset:
            view.name_position(dim, int(bound))
    if step != 1 and view.classes.sizes[view.out[dim]] == 1:
        view.classes.pin([view.inputs[0][dim]])
    view.classes.scale_all(view.inputs[0], view.out) if step != 1 else view.classes.tie_all(
        view.inputs[0], view.out
    )


def _select(view: View) -> None:
    dim = view.argument(1, "dim") % len(view.inputs[0])
    if view.argument(2, "index") not in (0, -1):
        view.classes.pin([view.inputs[0][dim]])
    view.classes.tie_all([d for i, d in enumerate(view.inputs[0]) if i != dim], view.out)


def _cat(view: View) -> None:
    dim = view.argument(1, "dim", 0) % len(view.out)
    end = 0
    for dims in view.inputs:
        if len(dims) != len(view.out):
            return _pin(view)
        view.classes.tie_all(dims, view.out)
        if view.classes.sizes[dims[dim]] == 1:  # it cannot shrink along
            view.classes.pin([view.out[dim]])
        end += view.classes.sizes[dims[dim]]
        if end < view.classes.sizes[view.out[dim]]:
            view.classes.positions.append((view.out[dim], end))
    return None


def _stack(view: View) -> None:
    at = view.argument(1, "dim", 0) % len(view.out)
    for dims in view.inputs:
        view.classes.tie_all(dims, [*view.out[:at], *view.out[at + 1 :]])


def _embedding(view: View) -> None:
    weight, indices = view.inputs[:2]
    view.classes.tie_all(indices, view.out[:-1])
    view.classes.tie(weight[1], view.out[-1])


def _attention(view: View) -> None:
    q, k, v, *mask = view.inputs
    classes = view.classes
    classes.tie_all(q[:-1], view.out[:-1])
    classes.tie(q[-1], k[-1])
    classes.tie(v[-1], view.out[-1])
    classes.tie_all(k[:-1], v[:-1])
    classes.scale_all(q[:-2], k[:-2])  # several query heads to a key head stay several
    for dims in mask:
        classes.tie_all(dims, [*q[:-1], k[-2]])


def _cross_entropy(view: View) -> None:
    logits, target = view.inputs[:2]
    rest = [logits[0], *logits[2:]] if len(logits) > 1 else []
    view.classes.tie_all(target if len(target) == len(rest) else [], rest)
    view.classes.tie_all(view.out, rest)
    if len(view.inputs) > 2:
        view.classes.pin([*view.inputs[2], logits[min(1, len(logits) - 1)]])


def _made(view: View) -> None:
    """A value made of numbers: what uses it ties its sizes."""


def _arange(view: View) -> None:
    start = view.node.args[0] if len(view.node.args) > 1 else 0
    if start != 0:
        view.classes.pin(view.out)


def places_of(node: Any) -> tuple[fx.Node, int, int] | None:
    """Return (value, its dimension, divisor) if `node` holds places along that dimension, divided.

    None if it is not known to hold any.
    """
    by = 1
    while isinstance(node, fx.Node):
        name = op_name(node)
        if name in ("argsort", "arange"):
            dim = node.args[1] if name == "argsort" and len(node.args) > 1 else -1
            return (node, int(dim), by) if name != "arange" or _is_plain(node) else None  # type: ignore[call-overload]
        if name == "getitem" and node.args[1] == 1 and op_name(node.args[0]) in ("topk", "sort"):  # type: ignore[arg-type]
            source: Any = node.args[0]
            at = 2 if op_name(source) == "topk" else 1
            dim = source.args[at] if len(source.args) > at else -1
            return source.args[0], int(dim), by
        if name == "floor_divide" and isinstance(node.args[1], int):
            by *= node.args[1]
        elif name == "index_put":  # the inverse of a permutation
            node = node.args[2]
            continue
        elif name not in MOVED and not (name == "add" and node.args[1] == 0):
            return None
        node = node.args[0]
    return None


def _is_plain(node: fx.Node) -> bool:
    return len(node.args) == 1 or (node.args[0] == 0 and len(node.args) == 2)


def _picks(view: View, dim: int, index: Any) -> None:
    """`index` names places along `dim`: they must stay within it."""
    classes, found = view.classes, places_of(index)
    if found is not None:
        node, at, by = found
        along = view.dims[node][0][at]
        if classes.sizes[along] == by * classes.sizes[dim]:
            if by == 1:
                classes.tie(along, dim)
            else:
                several = classes.add([by], [by])
                classes.pin(several)
                classes.products.append(([along], [dim, *several]))
            return
    classes.pin([dim])


def _sorted(view: View) -> None:
    """Numbers are put in order; among scores the best are chosen, out of as many as there are."""
    x = view.inputs[0]
    at = 2 if op_name(view.node) == "topk" else 1
    dim = view.argument(at, "dim", -1) % len(x)
    scores = view.node.args[0].meta["val"].is_floating_point()  # type: ignore[union-attr]
    for result in view.results:
        for index, (a, b) in enumerate(zip(x, result, strict=True)):
            if index == dim and scores:
                view.classes.pin([a, b])
            else:
                view.classes.tie(a, b)


def _index_put(view: View) -> None:
    x, index, values = view.inputs
    (given,) = view.argument(1, "indices")
    view.classes.tie_all(x, view.out)
    view.classes.tie_all(index, values)
    view.classes.tie_all(x[1:], values[len(index) :])
    _picks(view, x[0], given)


def _histogram(view: View) -> None:
    view.classes.pin(view.out)


def _gather(view: View) -> None:
    x, index = view.inputs[:2]
    dim = view.argument(1, "dim") % len(x)
    view.classes.tie_all(index, view.out)
    _picks(view, x[dim], view.argument(2, "index"))
    for at, (a, b) in enumerate(zip(x, index, strict=True)):
        if at == dim:
            continue
        if view.classes.sizes[a] == view.classes.sizes[b]:
            view.classes.tie(a, b)
        else:
            view.classes.pin([a, b])


def _grouped(view: View) -> None:
    rows, weights, *offsets = view.inputs
    view.classes.tie(rows[-1], weights[-2])
    view.classes.tie(rows[0], view.out[0])
    view.classes.tie(weights[-1], view.out[-1])
    for dims in offsets:
        view.classes.tie_all(dims, weights[:1])


def _indexed(view: View) -> None:
    """Indices side by side: their dimensions stand for those that they pick from."""
    indices = view.argument(1, "indices")
    given = [at for at, index in enumerate(indices) if index is not None]
    x, *found = view.inputs
    first, last = given[0], given[-1]
    is_plain = given == list(range(first, last + 1)) and len(found) == len(given)
    if not is_plain or any(indices[at].meta["val"].dtype == torch.bool for at in given):
        return _pin(view)
    rest = x[last + 1 :]
    middle = view.out[first : len(view.out) - len(rest)]
    view.classes.tie_all(x[:first], view.out[:first])
    view.classes.tie_all(rest, view.out)
    for at, index in zip(given, found, strict=True):
        view.classes.tie_all(index, middle)
        _picks(view, x[at], indices[at])
    return None


def _compared(view: View) -> None:
    """A number that places are compared with is a place itself."""
    _same(view)
    bound, found = view.node.args[1], places_of(view.node.args[0])
    if isinstance(bound, int) and found is not None and found[2] == 1:
        dim = view.dims[found[0]][0][found[1]]
        if 0 < bound < view.classes.sizes[dim]:
            view.classes.positions.append((dim, bound))


def _heads(view: View) -> None:
    """ilm::attention, ilm::rotary: (batch, tokens, heads, head size); tables of half the size."""
    first, *others = view.inputs
    for dims in [*others, *view.results]:
        if len(dims) == 4:
            view.classes.scale_all(first, dims)
        elif dims:
            view.classes.scale(first[-1], dims[-1])
            view.classes.tie_all(dims[1:-1], first[1:2])
    for result, source in zip(view.results, view.inputs, strict=False):
        view.classes.tie_all(source, result)


def _packed_heads(view: View) -> None:
    """ilm::qkv_rotary: (batch, tokens, groups, heads of a group, head size)."""
    packed, *tables = view.inputs
    view.classes.pin([packed[3]])
    for result in view.results:
        view.classes.scale_all([*packed[:3], packed[4]], result)
    for table in tables:
        view.classes.scale(packed[4], table[-1])
        view.classes.tie_all(table[1:-1], packed[1:2])


ALONG_LAST = (
    *("redistribute", "seeded_dropout", "to", "clone", "contiguous", "detach", "alias", "where"),
    *("masked_fill", "softmax", "log_softmax", "cumsum", "cumprod", "layer_norm", "rms_norm"),
    *("ilm::rms_norm", "ilm::add_rms_norm", "ilm::swiglu", "tril", "triu", "type_as", "flip"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "fill", "expand", "copy", "dropout"),
    *("softplus", "log_sigmoid"),
    *("hardtanh", "relu6", "mish", "bitwise_not", "floor_divide", "pad", "constant_pad_nd"),
)
# Through these places stay places.
MOVED = {
    *("redistribute", "slice", "reshape", "contiguous", "clone", "detach", "to", "unsqueeze"),
    *("expand", "transpose", "permute", "select", "squeeze"),
}
RELATIONS: dict[str, Relation] = {
    **dict.fromkeys(ALONG_LAST, _same),
    **dict.fromkeys(("sum", "mean", "partial_mean", "amax", "amin", "logsumexp", "prod"),
                    _reduced(1, "dim")),
    **dict.fromkeys(("var", "std", "any", "all", "argmax", "argmin"), _reduced(1, "dim")),
    "linalg_vector_norm": _reduced(2, "dim"),
    "linear": _linear,
    **dict.fromkeys(("matmul", "bmm", "mm", "addmm", "baddbmm"), _matmul),
    "einsum": _einsum,
    "transpose": _permuted(_transposed),
    "permute": _permuted(lambda view, rank: [d % rank for d in view.argument(1, "dims")]),
    "t": _permuted(lambda view, rank: list(range(rank))[::-1]),
    "unsqueeze": _one_more,
    "squeeze": _reduced(1, "dim"),
    "reshape": _reshape,
    "slice": _slice,
    "select": _select,
    "cat": _cat,
    "stack": _stack,
    **dict.fromkeys(("embedding", "vocab_embedding"), _embedding),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("ilm::attention", "ilm::rotary"), _heads),
    "ilm::qkv_rotary": _packed_heads,
    **dict.fromkeys(("cross_entropy_loss", "vocab_cross_entropy"), _cross_entropy),
    **dict.fromkeys(("full", "zeros", "ones", "empty", "scalar_tensor", "new_zeros", "new_ones",
                     "new_full", "new_empty"), _made),
    "arange": _arange,
    "gather": _gather,
    **dict.fromkeys(("topk", "sort", "argsort"), _sorted),
    **dict.fromkeys(("ge", "gt", "le", "lt", "eq", "ne"), _compared),
    **dict.fromkeys(("_grouped_mm", "transformers::grouped_mm_fallback"), _grouped),
    "index": _indexed,
    "index_put": _index_put,
    **dict.fromkeys(("histc", "bincount"), _histogram),
}  # fmt: skip
