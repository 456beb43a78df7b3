"""Mixed precision as casts in the graph: products in a low dtype, delicate sums in float32."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from ilm_compile.errors import PlanError
from ilm_compile.ops.nodes import called_name
from ilm_compile.ops.precision import BF16, FP32, LOSS, MOVE, PRODUCT
from ilm_compile.ops.spec import spec_of
from ilm_compile.passes.base import Pass
from ilm_compile.program.communicator import shape_communicators
from ilm_compile.program.layout import layout_of
from ilm_compile.program.program import Program
from ilm_compile.program.values import is_tuple, run_without_data, tensors_of
from ilm_compile.rewrite.edit import create_cast
from ilm_compile.rewrite.parameter_free import parameter_free_nodes, precision_of

_CAST = torch.ops.aten.to.dtype


@dataclass(frozen=True, kw_only=True)
class CastBF16(Pass):
    """Insert the casts of bf16 training; parameters stay as they are and are cast where used.

    Fused ops keep weights and tables as they are and round once, where the plain calls would have.
    `ilm_compile.ops.precision` says which op computes in what, and `report` prints it for a
    program. The gradient of a float32 parameter is float32, because autograd undoes the cast.
    Changes numerics: `tolerance` is what the 8 bits of bf16 leave of a loss.
    """

    name: ClassVar[str] = "cast-bf16"
    low: ClassVar[torch.dtype] = BF16
    after: ClassVar[frozenset[str]] = frozenset({"sharded"})
    ensures: ClassVar[frozenset[str]] = frozenset({"cast"})
    numerics: ClassVar[Literal["preserving", "changing"]] = "changing"
    tolerance: ClassVar[float] = 2e-2

    def apply(self, program: Program) -> None:
        for variable in program.parameters().values():
            if variable.dtype not in (FP32, self.low):
                raise PlanError(
                    f"{self.name}: expected parameters in float32 or {_name(self.low)}, got "
                    f"{variable.name} in {variable.dtype}; convert the model with model.float(), "
                    "or use dtype=None"
                )
        before = len(program.graph.find_nodes(op="call_function", target=_CAST))
        products = _Caster(program, self.low).run()
        casts = len(program.graph.find_nodes(op="call_function", target=_CAST)) - before
        program.decisions.append(
            f"{self.name}: {products} matrix products run in {_name(self.low)}; norms, softmax, "
            f"loss and reductions in float32; {casts} casts added, parameters stay as they are"
        )

    @staticmethod
    def report(program: Program) -> str:
        """Return a table of what runs in which dtype and why, one line per op and dtype."""
        parameter_free = parameter_free_nodes(program)
        counts = Counter(
            (
                called_name(node),
                str(tensors_of(node.meta["val"])[0].dtype).removeprefix("torch."),
                precision_of(node, parameter_free).why,
            )
            for node in program.calls()
            if tensors_of(node.meta["val"])[0].is_floating_point()
        )
        rows = [(op, str(count), dtype, why) for (op, dtype, why), count in sorted(counts.items())]
        rows.insert(0, ("op", "count", "dtype", "why"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            f"{op:<{widths[0]}}  {count:>{widths[1]}}  {dtype:<{widths[2]}}  {why}"
            for op, count, dtype, why in rows
        )


@dataclass(frozen=True, kw_only=True)
class CastFP16(CastBF16):
    """The same for float16, which has 11 bits, but no numbers above 65504 and few below 6e-5.

    Gradients that small would be lost: train with a loss scale (`ilm_compile.runtime.LossScaler`).
    """

    name: ClassVar[str] = "cast-fp16"
    low: ClassVar[torch.dtype] = torch.float16
    tolerance: ClassVar[float] = 3e-3


class _Caster:
    """Walks the graph in order, casting inputs and carrying the new dtypes forward."""

    def __init__(self, program: Program, low: torch.dtype) -> None:
        self.program = program
        self.low = low
        self.parameter_free = parameter_free_nodes(program)
        # One cast per value, dtype and region: a cast shared by several blocks would have to be
        # sent between stages, and kept by blocks that are recomputed.
        self.casts: dict[tuple[fx.Node, torch.dtype, int], fx.Node] = {}

    def run(self) -> int:
        """Insert all casts; returns the number of matrix products in the low dtype."""
        products = 0
        with shape_communicators(self.program.plan.axes), torch.no_grad():
            for node in list(self.program.calls()):
                products += self._visit(node)
        return products

    def _visit(self, node: fx.Node) -> bool:
        precision = precision_of(node, self.parameter_free)
        if node in self.parameter_free:
            return False
        if node.target is _CAST and (same := self._already(node.all_input_nodes[0], node.args[1])):
            node.replace_all_uses_with(same)
            self.program.graph.erase_node(node)
            return False
        wanted = BF16 if precision is MOVE and self._is_read_low(node) else precision.inputs
        if wanted is not None:
            self._cast_inputs(node, self._lowered(wanted))
        if precision.values:
            self._cast_values(node, precision.values)
        if precision is LOSS:
            self._drop_cast(node)
        try:
            node.meta["val"] = run_without_data(node)
        except RuntimeError:  # one of the few ops that neither have a row nor promote their inputs
            self._cast_inputs(node, FP32)
            node.meta["val"] = run_without_data(node)
        if precision.result is not None:
            self._cast_result(node, self._lowered(precision.result))
        return precision is PRODUCT

    def _lowered(self, dtype: torch.dtype) -> torch.dtype:
        """What a row of the table, written for bf16, asks for."""
        return self.low if dtype == BF16 else dtype

    def _is_read_low(self, move: fx.Node) -> bool:
        """Whether a value can be rounded before it moves between ranks, at half the bytes."""
        is_partial = layout_of(move.all_input_nodes[0]).is_partial
        readers = [precision_of(user, self.parameter_free) for user in move.users]
        return not is_partial and all(reader.inputs == BF16 for reader in readers)

    def _cast_values(self, node: fx.Node, count: int) -> None:
        """Give a fused op its `count` activations in one dtype, and the weight beside them in it.

        The op rounds its result to that dtype. Where a reader would have got float32 from the plain
        calls (another norm, a sum), it still does.
        """
        values, rest = node.all_input_nodes[:count], node.all_input_nodes[count:]
        is_rounded = all(_dtype(value) == self.low for value in values) and self._is_rounded(node)
        dtype = self.low if is_rounded else FP32
        for value in (*values, *(r for r in rest if not is_rounded and _dtype(r) == self.low)):
            if _dtype(value) != dtype:
                node.replace_input_with(value, self._cast(value, dtype, near=node))

    def _drop_cast(self, loss: fx.Node) -> None:
        """Give a loss that computes in float32 inside the low logits that the model widened for it.

        The widened copy, the largest value of the model, is then never made.
        """
        chain = [loss.all_input_nodes[0]]
        while spec_of(chain[-1].target).carries and len(chain[-1].users) == 1:
            chain.append(chain[-1].all_input_nodes[0])
        cast = chain.pop()
        if cast.target is not _CAST or len(cast.users) > 1 or _dtype(cast) != FP32:
            return
        origin = cast.all_input_nodes[0]
        if _dtype(origin) == self.low:
            cast.replace_all_uses_with(origin)
            self.program.graph.erase_node(cast)
            for node in reversed(chain):
                node.meta["val"] = run_without_data(node)

    def _is_rounded(self, node: fx.Node) -> bool:
        """Whether all who read `node` read it in bf16, at once or after it was moved about."""
        return all(
            precision_of(user, self.parameter_free).inputs == BF16
            or (spec_of(user.target).carries and self._is_rounded(user))
            for user in node.users
        )

    def _cast_inputs(self, node: fx.Node, dtype: torch.dtype) -> None:
        for source in node.all_input_nodes:
            if (
                not is_tuple(source)
                and source.meta["val"].is_floating_point()
                and _dtype(source) != dtype
            ):
                node.replace_input_with(source, self._cast(source, dtype, near=node))

    def _cast_result(self, node: fx.Node, dtype: torch.dtype) -> None:
        for whole in _where_whole(node):
            key = whole, dtype, whole.meta["region"]
            if _dtype(whole) == dtype or key in self.casts:
                continue
            with self.program.graph.inserting_after(whole):
                self.casts[key] = cast = create_cast(self.program, whole, dtype, near=whole)
            whole.replace_all_uses_with(cast, delete_user_cb=partial(operator.is_not, cast))

    def _cast(self, source: fx.Node, dtype: torch.dtype, *, near: fx.Node) -> fx.Node:
        """Return `source` in `dtype`, for the use of node `near`."""
        if same := self._already(source, dtype):
            return same
        key = source, dtype, near.meta["region"]
        if key not in self.casts:
            with self.program.graph.inserting_before(near):
                self.casts[key] = create_cast(self.program, source, dtype, near=near)
        return self.casts[key]

    def _already(self, source: fx.Node, dtype: Any) -> fx.Node | None:
        """Return a node that holds `source` in `dtype` without a cast, if there is one.

        bf16 -> float32 -> bf16 is exact and gives the original; float32 -> bf16 -> float32 rounds.
        """
        if _dtype(source) == dtype:
            return source
        if source.target is _CAST and _dtype(source) == FP32:
            origin = source.all_input_nodes[0]
            return origin if _dtype(origin) == dtype == self.low else None
        return None


def _where_whole(node: fx.Node) -> list[fx.Node]:
    """Return `node`, or what becomes of it once it is summed up: rounding parts is not linear."""
    if not layout_of(node).is_partial:
        return [node]
    return list(dict.fromkeys(whole for user in node.users for whole in _where_whole(user)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
