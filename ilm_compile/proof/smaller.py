"""Smaller sizes for a program that is too large to be run here: the same nodes on smaller tensors.

Nothing is rebuilt: the traced graph and the compiled one shrink together, class by class of their
dimensions (see `ilm_compile.proof.sizes`). A class is divided by a number that divides all its
sizes and positions, or has a number taken off all of them; heads, groups and whatever the ranks
share keep at least two of what they had more of. Features shrink first, tokens only as far as time
and memory ask for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from ilm_compile.program.program import Program
from ilm_compile.proof.dims import Classes, Dims
from ilm_compile.proof.sizes import dimensions

SMALLEST = 8  # size of a class that was divided
NEAR = 4  # to the beginning is a place by which something is shifted
FEW = 2  # that a rank keeps of what it had more of
WORDS = 64  # classes of a vocabulary at least, where they are taken off
MAX_STEPS = 400  # of a search for what else must shrink


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to the sizes of a class: `less` is taken off, the rest divided by `by`.

    It is taken off behind the first `kept` places, which stay: a label is shifted by one.
    """

    by: int = 1
    less: int = 0
    kept: int = 0

    def of(self, size: int) -> int:
        """Return a size or a position, smaller; zero stays zero."""
        return size if size <= self.kept else (size - self.less) // self.by


Side = tuple[tuple[int, int], ...]  # (class, size) of each dimension
Changes = dict[int, Change]


@dataclass
class Sizes:
    """The dimensions of the traced and the compiled graph of one model, and their `changes`."""

    traced: Program
    program: Program
    classes: Classes = field(default_factory=Classes)
    changes: Changes = field(default_factory=dict)
    first: dict[fx.Node, list[Dims]] = field(init=False)  # of the traced graph
    second: dict[fx.Node, list[Dims]] = field(init=False)

    def __post_init__(self) -> None:
        self.first = dimensions(self.classes, self.traced)
        self.second = dimensions(self.classes, self.program)
        self._join()
        self._group()

    def _join(self) -> None:
        """Tie what has one name in both graphs."""
        ours = {_key(node): dims for node, dims in self.second.items()}
        sizes = self.classes.sizes
        for node, dims in self.first.items():
            same = ours.get(_key(node))
            if same is None or [*map(len, same)] != [*map(len, dims)]:
                continue
            for left, right in zip(dims, same, strict=True):
                for a, b in zip(left, right, strict=True):
                    if node.op != "call_function" or sizes[a] == sizes[b]:
                        self.classes.tie(a, b)

    def _group(self) -> None:
        classes, find = self.classes, self.classes.find
        members: dict[int, Dims] = defaultdict(list)
        for dim in range(len(classes.sizes)):
            members[find(dim)].append(dim)
        self.places: dict[int, set[int]] = defaultdict(set)
        for dim, place in classes.positions:
            self.places[find(dim)].add(place)
        self.bounds = {
            root: sorted({(classes.sizes[d], max(1, classes.locals[d])) for d in dims})
            for root, dims in members.items()
        }
        self.scaled = {find(dim) for dim in classes.scaled}
        self.pinned = {find(dim) for dim in classes.pinned}
        self.pinned |= {root for root in members if self.largest(root) <= 1}
        self.products: list[tuple[Side, Side]] = sorted(
            {(self._side(left), self._side(right)) for left, right in classes.products}
        )
        self.involved: dict[int, list[int]] = defaultdict(list)
        for number, sides in enumerate(self.products):
            for root in {root for side in sides for root, _ in side}:
                self.involved[root].append(number)

    def _side(self, dims: Dims) -> Side:
        return tuple(sorted((self.classes.find(d), self.classes.sizes[d]) for d in dims))

    def largest(self, root: int) -> int:
        """Return the largest size in a class."""
        return self.bounds[root][-1][0]

    def divide(self, root: int, by: int) -> bool:
        """Divide a class, and what must shrink with it; whether that can be done."""
        return self._try(root, Change(by=by))

    def take_off(self, root: int, less: int) -> bool:
        """Take `less` off the sizes of a class, likewise."""
        return self._try(root, Change(less=less))

    def _try(self, root: int, change: Change) -> bool:
        self._steps = MAX_STEPS
        found = self._apply(dict(self.changes), root, change)
        if found is not None:
            self.changes = found
        return found is not None

    def _apply(self, changes: Changes, root: int, change: Change) -> Changes | None:
        """Return `changes` with one more, and what it entails; None if a size forbids it."""
        self._steps -= 1
        old = changes.get(root, Change())
        if (old.less and change.by > 1) or (change.less and old != Change()):
            return None
        less = old.less + change.less
        new = Change(old.by * change.by, less, self._kept(root) if less else 0)
        if self._steps < 0 or root in self.pinned or not self._fits(root, new):
            return None
        changes[root] = new
        return self._mend(changes, self.involved[root])

    def _mend(self, changes: Changes, numbers: list[int]) -> Changes | None:
        """Return `changes` with more of them, so that all products are equal again."""
        for number in numbers:
            left, right = self.products[number]
            a, b = (_product(side, changes) for side in (left, right))
            if a == b:
                continue
            large, now, small = (right, b, a) if a < b else (left, a, b)
            for root, size in sorted(set(large), key=lambda each: -each[1]):
                held = changes.get(root, Change()).of(size)
                wanted = small * held // now
                if large.count((root, size)) > 1 or small * held % now or not 0 < wanted < held:
                    continue
                more = _needed(changes.get(root, Change()), held, wanted)
                found = more and self._apply(dict(changes), root, more)
                found = found and self._mend(found, [number])
                if found:
                    return self._mend(found, numbers)
            return None
        return changes

    def _kept(self, root: int) -> int:
        """Return the last of the places near the beginning of a class that something names."""
        return max((place for place in self.places[root] if place <= NEAR), default=0)

    def _fits(self, root: int, change: Change) -> bool:
        """Whether a class can change so: sizes whole, ranks even, positions in place."""
        for size, local in self.bounds[root]:
            count = max(1, size // local)
            if not size:  # of an empty slice
                continue
            if (size - change.less) % (change.by * count) or change.of(size) < 1:
                return False
            if change.of(size) // count < min(local, FEW):
                return False
        places = self.places[root]
        if change.less and root in self.scaled:
            return False
        if change.less:
            moved = {p for p in places if p > change.kept}
            moved |= {size for size, _ in self.bounds[root] if size}
            return change.less + change.kept < min(moved)
        smallest = min(SMALLEST, self.largest(root))
        return change.of(self.largest(root)) >= smallest and all(p % change.by == 0 for p in places)


def shrink_features(sizes: Sizes, kept: set[int]) -> None:
    """Make every class as small as it can be, but those of `kept`."""
    for root in sorted(sizes.bounds, key=lambda root: (-sizes.largest(root), root)):
        if root in kept or root in sizes.pinned or sizes.largest(root) <= SMALLEST:
            continue
        common = math.gcd(*(size for size, _ in sizes.bounds[root]), *sizes.places[root])
        divisors = (by for by in sorted(_divisors(common), reverse=True) if by > 1)
        if not any(sizes.divide(root, by) for by in divisors):
            shrink_to(sizes, root, WORDS)


def shrink_to(sizes: Sizes, root: int, target: int) -> bool:
    """Bring the largest size of a class down to about `target`; whether that can be done."""
    largest = sizes.largest(root)
    if largest <= target or root in sizes.changes:
        return False
    step = math.lcm(*(max(1, size // local) for size, local in sizes.bounds[root]))
    by, less = largest // target, (largest - target) // step * step
    return (by > 1 and sizes.divide(root, by)) or (less > 0 and sizes.take_off(root, less))


def _needed(old: Change, held: int, wanted: int) -> Change | None:
    """Return the change that makes `wanted` of `held`."""
    if held % wanted == 0:
        return Change(by=held // wanted)
    return Change(less=held - wanted) if old == Change() else None


def _divisors(number: int) -> set[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return {*small, *(number // n for n in small)}


def _product(side: Side, changes: Mapping[int, Change]) -> int:
    return math.prod(changes.get(root, Change()).of(size) for root, size in side)


def _key(node: fx.Node) -> str:
    return str(node.target) if node.op in ("get_attr", "placeholder") else node.name
