"""How much of a program can be run here, and what is run in its place where it is too large.

Times are rough, for one processor in float64: what counts is that a proof ends, not when.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import fx

from ilm_compile.cost.flops import forward_flops
from ilm_compile.errors import PlanError
from ilm_compile.program.program import Program
from ilm_compile.program.query_attention import parts_of
from ilm_compile.program.values import tensors_of
from ilm_compile.proof.depth import without_repeats
from ilm_compile.proof.inputs import lookups
from ilm_compile.proof.pieces import Piece
from ilm_compile.proof.resize import resized
from ilm_compile.proof.smaller import Sizes, shrink_features, shrink_to

FLOPS = 4e9  # a second
ELEMENTS = 3e8  # of values made and differentiated, a second
CALL = 1.2e-4  # seconds of Python for a call, forward and backward
BYTES = 8
SECONDS = 8.0  # that the pieces, and that the step, may take
MEMORY = 2e9  # that one piece's values may take
TOKENS = (4096, 2048, 1024, 512, 256, 128, 64, 32, 16)
ATTENTION = {
    *("aten::scaled_dot_product_attention", "ilm::attention"),
    *("ilm::query_attention", "ilm::query_dot_product_attention"),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Of the calls of a graph on one rank that does all the work: seconds, bytes of its values."""

    seconds: float
    num_bytes: float
    calls: int


def cost(nodes: Iterable[fx.Node]) -> Cost:
    """Return what running `nodes` forward and backward takes."""
    seconds = num_bytes = 0.0
    calls = 0
    for node in nodes:
        values = tensors_of(node.meta.get("val"))
        elements = sum(value.numel() for value in values)
        if node.op == "call_function":
            calls += 1
            if str(getattr(getattr(node.target, "_schema", None), "name", "")) in ATTENTION:
                elements += 12 * _scores(node)
            seconds += 3 * forward_flops(node) / FLOPS + elements / ELEMENTS
        elif node.op == "get_attr":
            elements *= 2
        num_bytes += BYTES * elements
    return Cost(seconds, num_bytes, calls)


def _scores(node: fx.Node) -> int:
    """Return the number of attention scores, which the op makes inside."""
    q, k = (source.meta["val"].shape for source in node.all_input_nodes[:2])
    token = -2 if "dot_product" in str(node.target) else 1
    return int(math.prod(q[:-1]) * k[token]) * parts_of(node)


@dataclass(frozen=True, slots=True)
class Fit:
    """A program at a size that can be run: both graphs, and what was made smaller, in words."""

    traced: Program
    program: Program
    note: str = ""

    @property
    def is_own_size(self) -> bool:
        """Whether nothing was made smaller."""
        return not self.note


def fit_pieces(traced: Program, program: Program, distinct: Sequence[Piece]) -> Fit:
    """Return the program with sizes at which its `distinct` pieces can be run one by one.

    Raises `PlanError` if they are too large whatever is tried.
    """
    names = [{node.name for node in piece.traced.calls} for piece in distinct]

    def is_small(candidate: Program) -> bool:
        nodes = list(candidate.graph.nodes)
        costs = [cost(n for n in nodes if n.name in piece) for piece in names]
        return sum(2 * each.seconds for each in costs) <= SECONDS and all(
            each.num_bytes <= MEMORY for each in costs
        )

    return _smaller(traced, program, is_small, or_smallest=False)


def fit_step(
    traced: Program,
    program: Program,
    pieces: Sequence[Piece],
    signatures: Sequence[str],
    *,
    slices: int,
    ranks: int,
) -> Fit:
    """Return the program with sizes, and with as many blocks, as whole steps can be taken with.

    slices: micro-batches of all steps. ranks: that run each micro-batch of a stage.
    """

    def is_small(candidate: Program, extra: float = 0.0) -> bool:
        whole = cost(candidate.graph.nodes)
        seconds = 2 * slices * whole.seconds + extra
        return seconds <= SECONDS and whole.num_bytes <= MEMORY

    calls = sum(1 for _ in program.calls())
    if is_small(traced, slices * (1 + ranks) * calls * CALL):
        return Fit(traced, program)
    few = without_repeats(traced, program, pieces, signatures)
    gone = len(program.regions) - len({n.meta["region"] for n in few[1].calls()})
    found = _smaller(*few, is_small, or_smallest=True)
    words = [f"{gone} repeated blocks left out"] if gone else []
    return Fit(
        found.traced, found.program, ", ".join([*words, found.note] if found.note else words)
    )


def _smaller(
    traced: Program, program: Program, is_small: Callable[[Program], bool], *, or_smallest: bool
) -> Fit:
    """Return the largest of ever smaller sizes that is small enough."""
    if is_small(traced):
        return Fit(traced, program)

    @cache
    def at(limit: int) -> tuple[Sizes, Program]:
        sizes = _sizes_of(traced, program, limit)
        return sizes, resized(traced, sizes, sizes.first)

    index = bisect_left(TOKENS, True, key=lambda limit: is_small(at(limit)[1]))
    if index < len(TOKENS) or or_smallest:
        sizes, small = at(TOKENS[min(index, len(TOKENS) - 1)])
        return Fit(small, resized(program, sizes, sizes.second), _note(traced, sizes))
    raise PlanError(
        "verify: a region of the program is too large to be run here, and its sizes cannot be made "
        "smaller: an op in it is not known to keep its meaning at other sizes; verify it with a "
        "shorter sequence or a smaller model"
    )


def _sizes_of(traced: Program, program: Program, limit: int) -> Sizes:
    """Return sizes with at most `limit` tokens, and few of what else may be few."""
    sizes = Sizes(traced, program)
    tokens = {
        sizes.classes.find(dim)
        for node in traced.graph.find_nodes(op="placeholder")
        for dims in sizes.first[node]
        for dim in dims
    }
    words, fixed = _vocabularies(traced, sizes)
    sizes.pinned |= fixed
    shrink_features(sizes, tokens | words)
    for root in sorted(words):
        shrink_to(sizes, root, max(64, 8 * program.plan.tp))
    for root in sorted(tokens, key=sizes.largest):
        shrink_to(sizes, root, limit)
    return sizes


def _vocabularies(traced: Program, sizes: Sizes) -> tuple[set[int], set[int]]:
    """Return the classes of what inputs alone look up, and of other tables, which keep theirs."""
    words: set[int] = set()
    fixed: set[int] = set()
    for table, dim, is_free in lookups(traced):
        root = sizes.classes.find(sizes.first[table][0][dim])
        (words if is_free else fixed).add(root)
    return words - fixed, fixed


def _note(traced: Program, sizes: Sizes) -> str:
    """Return which sizes of the inputs, and how many others, are smaller."""
    if not sizes.changes:
        return ""
    inputs = {
        f"{sizes.classes.sizes[dim]} -> {change.of(sizes.classes.sizes[dim])}"
        for node in traced.graph.find_nodes(op="placeholder")
        for dims in sizes.first[node]
        for dim in dims
        if (change := sizes.changes.get(sizes.classes.find(dim)))
    }
    features = f"{len(sizes.changes)} sizes reduced"
    return f"{features}, tokens {', '.join(sorted(inputs))}" if inputs else features


def fits_whole(traced: Program, slices: int) -> bool:
    """Whether the model itself can be run here on `slices` micro-batches in one piece."""
    whole = cost(traced.graph.nodes)
    return 2 * slices * whole.seconds <= SECONDS and slices * whole.num_bytes <= 2 * MEMORY
