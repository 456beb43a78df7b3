"""The casts of a mixed-precision program, held to an error budget node by node.

In float64 a cast rounds nothing, so equality says nothing of where a program rounds. Here every
distinct region is run in the dtypes that it has, and each value's distance from the exact one is
compared with that of the traced graph run by the rule alone (`ilm_compile.ops.precision`):
products on rounded inputs, norms, softmax, losses and sums in float32, what no parameter reaches as
it is. A cast in the wrong place, of the residual stream, of positions, of the number of targets,
makes a value several times worse than its budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.errors import ProgramError
from ilm_compile.ops.precision import BF16
from ilm_compile.ops.spec import spec_of
from ilm_compile.program.layout import layout_of
from ilm_compile.program.program import Program
from ilm_compile.program.values import name_of, tensors_of, without_data
from ilm_compile.proof.exact import exact
from ilm_compile.proof.inputs import corner_batch, microbatch
from ilm_compile.proof.numbers import Run, Side, gather, relative_error, run, sizes_of
from ilm_compile.proof.pieces import Piece, extract, pieces
from ilm_compile.proof.regions import random_values
from ilm_compile.proof.subject import Subject, key_of
from ilm_compile.proof.weights import tensors_for
from ilm_compile.rewrite.parameter_free import parameter_free_nodes, precision_of

FACTOR = 6.0  # of the budget: partial sums are rounded on every rank
NOISE = 3e-5  # of sums in float32
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def check_precision(subject: Subject) -> str:
    """Return how far values are from exact ones, and what the budget is, in words.

    Raises `ProgramError` naming the first node, in order, that is over its budget.
    """
    fit = subject.fit_pieces()
    low = DTYPES[str(subject.program.plan.dtype)]
    keys = {key_of(piece) for piece in subject.distinct}
    precise = exact(fit.traced)
    inputs = microbatch(precise, corner_batch(precise, 1))
    free = parameter_free_nodes(fit.traced)
    names = {node.name for node in free}
    dtypes = _dtypes_by_rule(fit.traced, low, names)
    worst = 0.0
    for piece in pieces(precise, fit.program):
        if key_of(piece) not in keys:
            continue
        by = _Budget(low, names, dtypes)
        right, ours, budget = _runs(precise, fit.program, piece, inputs, subject.buffers, by)
        for node in extract(fit.program, piece.compiled).graph.nodes:
            if node.op != "call_function" or name_of(node) not in budget:
                continue
            if layout_of(node).is_routed:  # what leaves these rows is compared
                continue
            expected = right.seen[name_of(node)].values[0]
            if not expected.is_floating_point():
                continue
            parts = [part.double() for part in ours.seen[node.name].values]
            wholes = gather(parts, layout_of(node), sizes_of(fit.program), "value")
            error = max(relative_error(whole, expected) for whole in wholes)
            allowed = FACTOR * relative_error(budget[name_of(node)].double(), expected) + NOISE
            worst = max(worst, error)
            if not error <= allowed:
                raise ProgramError(
                    f"{fit.program.where(node)} is off by {error:.1e} under "
                    f"{subject.program.plan.dtype}, and its budget is {allowed:.1e}: something "
                    "before it is rounded that should not be; it takes "
                    f"{', '.join(map(_typed, node.all_input_nodes))}"
                )
    return f"every node within {FACTOR:g} times the rounding of its products; largest {worst:.0e}"


def _runs(
    precise: Program,
    program: Program,
    piece: Piece,
    inputs: Mapping[str, Tensor],
    buffers: dict[str, Tensor],
    by: _Budget,
) -> tuple[Run, Run, dict[str, Tensor]]:
    """Return a piece's exact run, the program's own, and the values that the rule alone gives."""
    old = Side.of(precise, extract(precise, piece.traced))
    new = Side.of(program, extract(program, piece.compiled))
    made = tensors_for(precise, buffers)
    tensors = {n: t.float().double() if t.is_floating_point() else t for n, t in made.items()}
    theirs, anchors = random_values(piece, round_to=by.low)
    nothing = [None] * len(piece.outputs)
    right = run(old, tensors, {**inputs, **theirs}, nothing)
    own = {n: _as(t, program, n) for n, t in tensors.items()}
    given = {**{n: _narrow(t) for n, t in inputs.items()}, **anchors}
    ours = run(new, own, given, nothing, in_own_dtypes=True)
    rule = _ByRule(old.graph, {n: _narrow(t) for n, t in tensors.items()}, by.low, by.free)
    names = [str(node.target) for node in old.placeholders()]
    values = {**inputs, **theirs}
    with torch.no_grad():
        rule.run(*(_narrow(values[name], by.dtypes.get(name)) for name in names))
    return right, ours, rule.seen


@dataclass(frozen=True, slots=True)
class _Budget:
    """What the rule needs known: the low dtype, what stays exact, dtypes of the traced values."""

    low: torch.dtype
    free: set[str]
    dtypes: Mapping[str, torch.dtype]


def _dtypes_by_rule(traced: Program, low: torch.dtype, free: set[str]) -> dict[str, torch.dtype]:
    """Return the dtype that the rule gives each value, found without data."""
    tensors = {
        str(n.target): _narrow(without_data(n.meta["val"]))
        for n in traced.graph.find_nodes(op="get_attr")
    }
    rule = _ByRule(traced.graph_module, tensors, low, free)
    rule.is_empty = True
    given = [without_data(n.meta["val"]) for n in traced.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        rule.run(*map(_narrow, given))
    return {name: value.dtype for name, value in rule.seen.items()}


def _as(value: Tensor, program: Program, name: str) -> Tensor:
    variable = program.variables.get(name)
    return value.to(variable.dtype) if variable else value


def _narrow(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return value.to(dtype or torch.float32) if value.is_floating_point() else value


def _typed(node: fx.Node) -> str:
    value = tensors_of(node.meta["val"])[0]
    return f"{node.name} {str(value.dtype).removeprefix('torch.')}"


class _ByRule(fx.Interpreter):
    """Runs a traced graph with the casts that the table of precisions asks for; keeps values."""

    def __init__(
        self,
        graph: fx.GraphModule,
        tensors: Mapping[str, Tensor],
        low: torch.dtype,
        free: set[str],
    ) -> None:
        super().__init__(graph)
        self.tensors, self.low, self.free = tensors, low, free
        self.is_empty = False  # it runs without data, for the dtypes alone
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            name = str(n.target)
            return self.tensors[name] if name in self.tensors else super().run_node(n)
        self.node = n
        value = super().run_node(n)
        if self.is_empty and tensors_of(value):
            value = without_data(value)
        if isinstance(value, Tensor) and n.op == "call_function":
            is_rounded = n.name not in self.free and _is_read_low(n)
            self.seen[n.name] = _cast(value, self.low) if is_rounded else value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        node = self.node
        precision = precision_of(node, {node} if node.name in self.free else set())
        wanted = self._lowered(precision.inputs)
        if wanted is not None:
            args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: _cast(a, wanted))
        # The exact graph asks for float64 where the model asks for float32.
        args, kwargs = fx.node.map_aggregate((args, kwargs), _single)
        try:
            value = super().call_function(target, args, kwargs)
        except RuntimeError:
            args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: _cast(a, torch.float32))
            value = super().call_function(target, args, kwargs)
        result = self._lowered(precision.result)
        return _cast(value, result) if result is not None else value

    def _lowered(self, dtype: torch.dtype | None) -> torch.dtype | None:
        return self.low if dtype == BF16 else dtype


def _is_read_low(node: fx.Node) -> bool:
    """Whether all who read `node` round it, at once or once it was moved: then it may be, too."""
    return bool(node.users) and all(
        user.op == "call_function"
        and (
            precision_of(user, ()).inputs == BF16
            or (spec_of(user.target).carries and _is_read_low(user))
        )
        for user in node.users
    )


def _single(argument: Any) -> Any:
    return torch.float32 if argument is torch.float64 else argument


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.to(dtype) if is_float else argument
