"""Pattern matching: find where a program computes what a small Python function computes.

A pattern is an ordinary function of tensors, written with torch functions or with ops. It is traced
as models are, into the same dialect, so it matches however the user wrote the same calculation.
Each parameter of the function is a wildcard, and its default value is an example of it:

* no default: any tensor; the pattern is traced with a float matrix of 4 x 4;
* a tensor: any tensor, where the pattern needs another rank or dtype to be traced;
* a number, list, string or dtype: any scalar argument of that kind. The value must be one that
  stands nowhere else in the pattern (1.25e-5, not 1), because it is recognised by its value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx, nn

from ilm_compile.errors import ProgramError
from ilm_compile.program.arguments import argument
from ilm_compile.program.constants import KeepConstants
from ilm_compile.program.functional import functionalize
from ilm_compile.program.normalize import normalize
from ilm_compile.program.program import Program, Variable

aten = torch.ops.aten
Function = Callable[..., Tensor]
Found = dict[Any, Any]  # what stands for each node, and for each scalar parameter, of the pattern

COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default}


@dataclass(frozen=True, slots=True)
class Match:
    """One place where a pattern was found.

    inputs: what each parameter of the pattern stands for, a node or a scalar. nodes: the calls of
    the pattern, in the order of the graph; the last of them is the result.
    """

    inputs: dict[str, Any]
    nodes: tuple[fx.Node, ...]

    @property
    def output(self) -> fx.Node:
        """The node that holds the result."""
        return self.nodes[-1]

    @property
    def escaping(self) -> tuple[fx.Node, ...]:
        """Values inside the match that somebody outside uses too: they cannot be taken away."""
        inside = set(self.nodes)
        return tuple(node for node in self.nodes[:-1] if not inside.issuperset(node.users))


def matches(program: Program, pattern: Function) -> list[Match]:
    """Return the places where `program` computes `pattern`, in graph order, none overlapping.

    The operands of sums and products are found in either order. Raises `ProgramError` for a
    function that is no pattern: more than one result, an unused parameter, a scalar not found.
    """
    matcher = _Matcher(pattern)
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    taken: set[fx.Node] = set()
    found = []
    for node in program.calls():
        match = matcher.match(node, order)
        if match is not None and taken.isdisjoint(match.nodes):
            taken.update(match.nodes)
            found.append(match)
    return found


def trace_function(function: Function, arguments: Mapping[str, Any]) -> fx.Graph:
    """Return the graph, in the project's dialect, of `function` called by name with `arguments`.

    Tensor arguments become placeholders of their names, in order; all others are built in.
    """
    tensors = {n: v.to("meta") for n, v in arguments.items() if isinstance(v, Tensor)}
    others = {name: value for name, value in arguments.items() if name not in tensors}
    variables: dict[str, Variable] = {}
    name = getattr(function, "__name__", "function")
    try:
        with KeepConstants():
            called = _Called(function, others)
            exported = functionalize(torch.export.export(called, (tensors,), strict=False))
    except ProgramError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{key} {list(t.shape)} {t.dtype}" for key, t in tensors.items())
        raise ProgramError(
            f"pattern: {name} cannot be traced with {shapes}: {error}\nGive a parameter that needs "
            "another shape or dtype an example of it: def pattern(x, w=torch.empty(4))"
        ) from error
    module, _ = normalize(exported, variables, list(tensors), ["result"])
    if variables:
        raise ProgramError(
            f"pattern: {name} makes tensors of its own from data; expected a function of its "
            "arguments alone, pass what it needs as an argument"
        )
    return module.graph


def parameters_of(function: Function) -> Mapping[str, inspect.Parameter]:
    """Return the parameters by name. Raises `ProgramError` if `function` does not name them."""
    try:
        found: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    except ValueError:  # torch.tanh and other functions written in C
        found = {}
    anonymous = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if not found or any(p.kind in anonymous for p in found.values()):
        raise ProgramError(
            f"pattern: expected a function with named parameters, got {function}; write lambda x: "
            "torch.tanh(x) for torch.tanh"
        )
    return found


class _Called(nn.Module):
    """A function as a module, which is what torch.export takes."""

    def __init__(self, function: Function, others: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.others = function, others

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        result = self.function(**tensors, **self.others)
        if not isinstance(result, Tensor):
            name = getattr(self.function, "__name__", "function")
            raise ProgramError(
                f"pattern: expected {name} to return one tensor, got {type(result).__name__}; "
                "write one pattern for each result"
            )
        return result


class _Matcher:
    """A traced pattern and the search for it, which backtracks over the orders of operands."""

    def __init__(self, pattern: Function) -> None:
        parameters = parameters_of(pattern).values()
        blank = inspect.Parameter.empty
        examples = {
            p.name: torch.empty(4, 4) if p.default is blank else p.default for p in parameters
        }
        graph = trace_function(pattern, examples)
        self.scalars = {n: v for n, v in examples.items() if not isinstance(v, Tensor)}
        self.result: fx.Node = graph.output_node().args[0][0]  # type: ignore[index, assignment]
        self.placeholders = graph.find_nodes(op="placeholder")
        self._refuse_useless(getattr(pattern, "__name__", "pattern"), graph)

    def _refuse_useless(self, name: str, graph: fx.Graph) -> None:
        if self.result.op != "call_function":
            raise ProgramError(f"pattern: {name} calls no op; expected a calculation to look for")
        used = {key for node in graph.nodes for key in map(self._scalar, _leaves(node))}
        unused = [str(node.target) for node in self.placeholders if not node.users]
        unused += [key for key in self.scalars if key not in used]
        if unused:
            raise ProgramError(
                f"pattern: no op of {name} takes its parameters {unused}; remove them, and give a "
                "scalar a default that reaches an op unchanged"
            )

    def match(self, node: fx.Node, order: Mapping[fx.Node, int]) -> Match | None:
        """Return the match whose result is `node`, if there is one."""
        found = next(self._unify(self.result, node, {}), None)
        if found is None:
            return None
        inputs = {str(p.target): found[p] for p in self.placeholders}
        inputs |= {name: found[name] for name in self.scalars}
        calls = {v for k, v in found.items() if isinstance(k, fx.Node) and k.op == "call_function"}
        return Match(inputs, tuple(sorted(calls, key=order.__getitem__)))

    def _unify(self, wanted: Any, got: Any, found: Found) -> Iterator[Found]:
        """Yield `found` extended so that `wanted`, of the pattern, stands for `got`."""
        if isinstance(wanted, fx.Node):
            if wanted in found:
                yield from [found] if found[wanted] is got else []
            elif isinstance(got, fx.Node):
                yield from self._unify_nodes(wanted, got, {**found, wanted: got})
        elif name := self._scalar(wanted):
            if _kind(got) is _kind(wanted) and _is_equal(found.get(name, got), got):
                yield {**found, name: got}
        elif isinstance(wanted, (list, tuple)) and isinstance(got, (list, tuple)):
            yield from self._unify_all(wanted, got, found)
        elif _is_equal(wanted, got):
            yield found

    def _unify_nodes(self, wanted: fx.Node, got: fx.Node, found: Found) -> Iterator[Found]:
        if wanted.op == "placeholder":
            yield found
        elif got.op == wanted.op and got.target == wanted.target:
            given = _arguments(wanted)
            swaps = wanted.target in COMMUTATIVE
            for operands in permutations(given[:2]) if swaps else [tuple(given[:2])]:
                yield from self._unify_all([*operands, *given[2:]], _arguments(got), found)

    def _unify_all(self, wanted: Any, got: Any, found: Found) -> Iterator[Found]:
        if len(wanted) != len(got):
            return
        if not len(wanted):
            yield found
            return
        for extended in self._unify(wanted[0], got[0], found):
            yield from self._unify_all(wanted[1:], got[1:], extended)

    def _scalar(self, value: Any) -> str | None:
        """Return the parameter whose example `value` is."""
        for name, example in self.scalars.items():
            if _is_equal(value, example):
                return name
        return None


def _kind(value: Any) -> type:
    """Return what a wildcard tells apart: numbers, whether int or float, are of one kind."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float
    return list if isinstance(value, (list, tuple)) else type(value)


def _is_equal(a: Any, b: Any) -> bool:
    if _kind(a) is not _kind(b):
        return False
    return list(a) == list(b) if _kind(a) is list else bool(a == b)


def _arguments(node: fx.Node) -> list[Any]:
    """Return all arguments of a call in the order of its schema, defaults included."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [*node.args, *sorted(node.kwargs.items())]
    return [argument(node, declared.name) for declared in node.target._schema.arguments]


def _leaves(node: fx.Node) -> Iterator[Any]:
    """Yield the arguments of a call, lists both whole and item by item."""
    for value in _arguments(node) if node.op == "call_function" else ():
        yield value
        if isinstance(value, (list, tuple)):
            yield from value
