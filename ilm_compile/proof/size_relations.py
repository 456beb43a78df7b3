"""How ops tie the sizes of what they take and give: products, reductions, views, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ilm_compile.proof.dims import END, Relation, View, pin


def reduced(index: int, name: str) -> Relation:
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


def linear(view: View) -> None:
    x, weight, *bias = view.inputs
    view.classes.tie(x[-1], weight[-1])
    view.classes.tie_all(x[:-1], view.out[:-1])
    for dims in ([weight[0]] if len(weight) > 1 else [], *bias):
        view.classes.tie_all(dims, view.out[-1:])


def gather_products(view: View) -> None:
    x, *operands = view.inputs
    biases = view.argument(2, "biases")
    given = iter(operands[len(view.results) :])
    for weight, bias, out in zip(operands, biases, view.results, strict=False):
        view.classes.tie_all(weight, [out[-1], x[-1]])
        view.classes.tie_all(x[:-1], out[:-1])
        view.classes.tie_all(next(given) if bias is not None else [], out[-1:])


def matmul(view: View) -> None:
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


def einsum(view: View) -> None:
    text = str(view.node.args[0]).replace(" ", "")
    if "." in text or "->" not in text:
        return pin(view)
    terms, result = text.split("->")
    letters: dict[str, int] = {}
    for dims, word in zip([*view.inputs, view.out], [*terms.split(","), result], strict=True):
        for dim, letter in zip(dims, word, strict=True):
            view.classes.tie(dim, letters.setdefault(letter, dim))
    return None


def permuted(order: Callable[[View, int], Sequence[int]]) -> Relation:
    def relation(view: View) -> None:
        x = view.inputs[0]
        view.classes.tie_all([x[d] for d in order(view, len(x))], view.out)

    return relation


def transposed(view: View, rank: int) -> list[int]:
    order = list(range(rank))
    a, b = (view.argument(i, n) % rank for i, n in ((1, "dim0"), (2, "dim1")))
    order[a], order[b] = order[b], order[a]
    return order


def one_more(view: View) -> None:
    at = view.argument(1, "dim") % len(view.out)
    view.classes.tie_all(view.inputs[0], [*view.out[:at], *view.out[at + 1 :]])


def reshape(view: View) -> None:
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


def sliced(view: View) -> None:
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


def select(view: View) -> None:
    dim = view.argument(1, "dim") % len(view.inputs[0])
    if view.argument(2, "index") not in (0, -1):
        view.classes.pin([view.inputs[0][dim]])
    view.classes.tie_all([d for i, d in enumerate(view.inputs[0]) if i != dim], view.out)


def cat(view: View) -> None:
    dim = view.argument(1, "dim", 0) % len(view.out)
    end = 0
    for dims in view.inputs:
        if len(dims) != len(view.out):
            return pin(view)
        view.classes.tie_all(dims, view.out)
        if view.classes.sizes[dims[dim]] == 1:  # it cannot shrink along
            view.classes.pin([view.out[dim]])
        end += view.classes.sizes[dims[dim]]
        if end < view.classes.sizes[view.out[dim]]:
            view.classes.positions.append((view.out[dim], end))
    return None


def stack(view: View) -> None:
    at = view.argument(1, "dim", 0) % len(view.out)
    for dims in view.inputs:
        view.classes.tie_all(dims, [*view.out[:at], *view.out[at + 1 :]])


def embedding(view: View) -> None:
    weight, indices = view.inputs[:2]
    view.classes.tie_all(indices, view.out[:-1])
    view.classes.tie(weight[1], view.out[-1])


def attention(view: View) -> None:
    q, k, v, *mask = view.inputs
    classes = view.classes
    classes.tie_all(q[:-1], view.out[:-1])
    classes.tie(q[-1], k[-1])
    classes.tie(v[-1], view.out[-1])
    classes.tie_all(k[:-1], v[:-1])
    classes.scale_all(q[:-2], k[:-2])  # several query heads to a key head stay several
    for dims in mask:
        classes.tie_all(dims, [*q[:-1], k[-2]])


def cross_entropy(view: View) -> None:
    logits, target = view.inputs[:2]
    rest = [logits[0], *logits[2:]] if len(logits) > 1 else []
    view.classes.tie_all(target if len(target) == len(rest) else [], rest)
    view.classes.tie_all(view.out, rest)
    if len(view.inputs) > 2:
        view.classes.pin([*view.inputs[2], logits[min(1, len(logits) - 1)]])


def linear_cross_entropy(view: View) -> None:
    x, weight, target = view.inputs[:3]
    view.classes.tie(x[1], weight[1])
    view.classes.tie(x[0], target[0])
    view.classes.tie_all(view.out, target)


def made(view: View) -> None:
    """A value made of numbers: what uses it ties its sizes."""


def arange(view: View) -> None:
    start = view.node.args[0] if len(view.node.args) > 1 else 0
    if start != 0:
        view.classes.pin(view.out)


def heads(view: View) -> None:
    """ilm::rotary: (batch, tokens, heads, head size); tables of half the size."""
    first, *others = view.inputs
    for dims in [*others, *view.results]:
        if len(dims) == 4:
            view.classes.scale_all(first, dims)
        elif dims:
            view.classes.scale(first[-1], dims[-1])
            view.classes.tie_all(dims[1:-1], first[1:2])
    for result, source in zip(view.results, view.inputs, strict=False):
        view.classes.tie_all(source, result)


def head_attention(view: View) -> None:
    """ilm::attention: (batch, tokens, heads, head size), and what says where documents are."""
    q, k, v, *documents = view.inputs
    for dims in (k, v, view.out):
        view.classes.scale_all(q, dims)
    view.classes.tie_all(q, view.out)
    for dims in documents:
        view.classes.tie_all(dims[:-1] if len(dims) < 4 else dims[2:3], q[:1])


def boundaries(view: View) -> None:
    """Documents, and one more in each row: (runs, sides, rows, documents + 1)."""
    given, (runs, sides, rows, count) = view.inputs[0], view.out
    view.classes.pin([given[-1], runs, sides, count])
    view.classes.tie_all(given[:-1], [rows])


def packed_heads(view: View) -> None:
    """ilm::qkv_rotary: (batch, tokens, groups, heads of a group, head size)."""
    packed, *tables = view.inputs
    view.classes.pin([packed[3]])
    for result in view.results:
        view.classes.scale_all([*packed[:3], packed[4]], result)
    for table in tables:
        view.classes.scale(packed[4], table[-1])
        view.classes.tie_all(table[1:-1], packed[1:2])


def grouped(view: View) -> None:
    rows, weights, *offsets = view.inputs
    view.classes.tie(rows[-1], weights[-2])
    view.classes.tie(rows[0], view.out[0])
    view.classes.tie(weights[-1], view.out[-1])
    for dims in offsets:
        view.classes.tie_all(dims, weights[:1])


def sorted_rows(view: View) -> None:
    """Each row of the first input, several times."""
    x, order = view.inputs
    repeats = view.argument(2, "repeats")
    view.classes.tie(order[0], view.out[0])
    view.classes.tie_all(x[1:], view.out[1:])
    if repeats == 1:
        view.classes.tie(x[0], view.out[0])
    else:
        several = view.classes.add([repeats], [repeats])
        view.classes.pin(several)
        view.classes.products.append(([view.out[0]], [x[0], *several]))


def unsorted_rows(view: View) -> None:
    rows, order = view.inputs
    view.classes.tie_all(rows, view.out)
    view.classes.tie(order[0], view.out[0])


def routed(view: View) -> None:
    view.classes.tie_all(view.inputs[0], view.out)
