"""What is known of an op, in one place: where its values may lie, what it computes in and costs.

The files beside this one, one for each family of ops, fill the table. The search and the check, the
casts, the cost model and the proof ask `spec_of(target)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from ilm_compile.errors import IlmCompileError
from ilm_compile.ops.call import Arguments, BatchRule, Call, LocalCall, Rule, Spelling, Strategy
from ilm_compile.ops.precision import FOLLOW, Precision
from ilm_compile.program.layout import MeshAxis
from ilm_compile.program.weight_parts import Product


@dataclass(frozen=True, slots=True)
class Flops:
    """How a product counts: its `forward` FLOPs, and the arguments it multiplies.

    slowest: the FLOPs of the rank that has most of a node, against the mean.
    """

    forward: Callable[[fx.Node], int]
    operands: Callable[[fx.Node], Sequence[Any]]
    slowest: Callable[[fx.Node], float] = lambda node: 1.0


Scaling = Literal["", "linear", "affine", "product", "quotient"]


@dataclass(frozen=True, slots=True)
class Picks:
    """Which arguments pick from what: `index` counts along `dim` of `source`."""

    source: int
    index: int
    dim: int
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSpec:
    """What is known of an op; what is left out is as of any op.

    rule: where its inputs and output may lie on an axis (`ilm_compile.ops.call`); without one they
    are whole, or repeated, on every rank. local: the call on the values of one rank, given the
    strategy and the axis; global_arguments: the way back, for arguments that speak of local sizes.
    other_axis: of a function that talks over one axis, the rule on the others; stands_for: or the
    op on whole values that it is the sharded form of, with its arguments; talks: on its own axis
    nothing but its rule holds, for equal inputs do not give equal results. exchanges: how many
    numbers per kept element the ranks exchange inside it, forward and backward, if they do.

    batch_rule: what further is known on the axis of the batch; reaches: the dimensions of its first
    input over which it reaches; cuts: it leaves some of them out. scales: which factors its result
    takes over: "linear", one that all inputs have; "affine", one that the numbers it adds have too;
    "product", that of each; "quotient", that of the first, divided by those of the others. sized:
    its arguments say how large its result is.

    precision: what it computes in under bf16 training; carries: it changes no number, and so is
    linear.
    flops: of products; reads_rows: of its first input it reads as much as it returns; moves: the
    bytes that a python function reads and writes.
    probability: place and name of the argument without which a random op draws nothing.
    labels: of a cross entropy, which argument has the numbers of the classes. picks: how integers
    choose among rows or classes. weight_part: of a product that can leave the gradient of its
    weight for later.
    """

    rule: Rule | None = None
    local: Callable[[Call, Strategy, str], LocalCall] | None = None
    global_arguments: Callable[[fx.Node, tuple[fx.Node, ...], MeshAxis], Arguments] | None = None
    other_axis: Rule | None = None
    stands_for: Spelling | None = None
    talks: bool = False
    exchanges: tuple[int, int] = (0, 0)
    batch_rule: BatchRule | None = None
    reaches: Callable[[Call], Iterable[int]] | None = None
    cuts: bool = False
    scales: Scaling = ""
    sized: bool = False
    precision: Precision = FOLLOW
    carries: bool = False
    flops: Flops | None = None
    reads_rows: bool = False
    moves: Callable[[fx.Node], int] | None = None
    probability: tuple[int, str] | None = None
    labels: int | None = None
    picks: Picks | None = None
    weight_part: Product | None = None


_SPECS: dict[Any, OpSpec] = {}
_NOTHING = OpSpec()
TAG_RULES: dict[torch.Tag, Rule] = {}  # of ops that others bring and tag


def define(spec: OpSpec, *targets: Any) -> None:
    """Say what is known of each of `targets`.

    Each is an op (an overload), a function of the graph, or a name such as ``library::op``, for an
    op that exists only once its library is imported. An op of which something is known can still be
    given a rule if it has none. Otherwise raises `IlmCompileError`: two places would speak of it.
    """
    if spec.carries:
        spec = replace(spec, scales="linear")
    for target in targets:
        known = _SPECS.get(target, _NOTHING)
        adds_rule = known.rule is None and spec == OpSpec(rule=spec.rule)
        elsewhere = [key for key in _SPECS if key == _name(target) or _name(key) == target]
        if (target in _SPECS and not adds_rule) or set(elsewhere) - {target}:
            raise IlmCompileError(
                f"ops: {target} is given twice; expected all that is known of an op in one place: "
                "one define(OpSpec(rule=..., flops=...), op), or one @rule(op, flops=...)"
            )
        _SPECS[target] = replace(known, rule=spec.rule) if adds_rule else spec


def rule(*targets: Any, **known: Any) -> Callable[[Rule], Rule]:
    """Define `targets` with the decorated function as their rule; `known`: fields of `OpSpec`."""

    def register(function: Rule) -> Rule:
        define(OpSpec(rule=function, **known), *targets)
        return function

    return register


def form(function: Any, op: Any, **known: Any) -> Callable[[Rule], Rule]:
    """As `rule`, for the sharded form of `op`: it takes an axis behind the arguments of that."""
    return rule(function, stands_for=lambda args: (op, args[:-1]), **known)


def spec_of(target: Any) -> OpSpec:
    """Return what is known of an op, found by itself or by its name; an empty spec if nothing is.

    Ops of other libraries that are tagged as pointwise have the rule of such ops.
    """
    found = _SPECS.get(target) or _SPECS.get(_name(target), _NOTHING)
    if found.rule is None and getattr(target, "namespace", "aten") != "aten":
        for tag in getattr(target, "tags", ()):
            if tag in TAG_RULES:
                return replace(found, rule=TAG_RULES[tag])
    return found


def whole_target(node: fx.Node) -> Any:
    """Return the op on whole values that a call is of, or is the sharded form of."""
    stands_for = spec_of(node.target).stands_for
    return stands_for(node.args)[0] if stands_for else node.target


def specs() -> Iterator[tuple[Any, OpSpec]]:
    """Yield every op, or name of one, with what is known of it."""
    yield from _SPECS.items()


def _name(target: Any) -> Any:
    schema = getattr(target, "_schema", None)
    return target if schema is None else schema.name
