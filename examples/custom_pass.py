"""Passes of your own: one soft-caps the logits, one fuses SwiGLU into one op, one merges weights.

`python -m examples.custom_pass` checks them on the zoo of small models and plans, compiles an
InternLM2 with them, and prints what they changed. docs/custom_passes.md goes through this file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

import ilm_compile
from ilm_compile.errors import PlanError
from ilm_compile.models import internlm2_tiny
from ilm_compile.passes import (
    Pass,
    PassReport,
    insert_before,
    matches,
    replace,
    replace_call,
    replace_parameters,
    run_passes,
    wrap,
)
from ilm_compile.program.copy import copy_program
from ilm_compile.program.diff import diff
from ilm_compile.program.placement import Placement
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.proof.check_pass import check_pass
from ilm_compile.sharding import Call, Strategy, rule

aten = torch.ops.aten

# An op that the graph can hold: what it computes, the shape of its result, and its gradient.


@torch.library.custom_op("example::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise. A kernel that does it in one go would be called here."""
    return F.silu(gate) * up


@swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid * (1 + gate * (1 - sigmoid))  # of silu at gate
    return grad * up * slope, grad * gate * sigmoid


swiglu.register_autograd(_differentiate, setup_context=_save_inputs)


@rule(torch.ops.example.swiglu.default)
def place_swiglu(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded in any dimension, both inputs alike."""
    for output in wanted:
        if output.is_shard:
            yield Strategy((output, output), output)


@dataclass(frozen=True, kw_only=True)
class FuseSwiGLU(Pass):
    """Compute every silu(gate) * up by one op."""

    name: ClassVar[str] = "fuse-swiglu"
    before: ClassVar[frozenset[str]] = frozenset({"sharded"})
    tolerance: ClassVar[float] = 1e-12

    def apply(self, program: Program) -> None:
        fused = replace(
            program,
            lambda gate, up: F.silu(gate) * up,
            lambda gate, up: swiglu(gate, up),
        )
        program.decisions.append(f"{self.name}: {len(fused)} SwiGLUs are one op each")


@dataclass(frozen=True, kw_only=True)
class SoftCap(Pass):
    """Keep logits within (-cap, cap): cap * tanh(logits / cap) (Gemma 2, arXiv:2408.00118)."""

    name: ClassVar[str] = "soft-cap"
    before: ClassVar[frozenset[str]] = frozenset({"sharded"})
    numerics: ClassVar[Literal["preserving", "changing"]] = "changing"
    tolerance: ClassVar[float] = 1e-2

    cap: float = 30.0

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise PlanError(f"{self.name}: cap must be positive, got {self.cap}")

    def apply(self, program: Program) -> None:
        for output, node in zip(program.output_names, program.outputs, strict=True):
            if output == "logits":
                wrap(program, node, lambda logits: self.cap * torch.tanh(logits / self.cap))
                program.decisions.append(f"{self.name}: logits stay within {self.cap:g}")


@dataclass(frozen=True, kw_only=True)
class MergeGateUp(Pass):
    """Compute the gate and the up projection of every SwiGLU by one product."""

    name: ClassVar[str] = "merge-gate-up"
    before: ClassVar[frozenset[str]] = frozenset({"sharded"})
    tolerance: ClassVar[float] = 1e-12

    def apply(self, program: Program) -> None:
        found = matches(program, lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u))
        for match in found:
            old = {match.inputs[key].target: match.inputs[key] for key in ("g", "u")}
            self._merge(program, match.inputs["x"], old)
        program.decisions.append(f"{self.name}: {len(found)} pairs of weights are one each")

    def _merge(self, program: Program, x: fx.Node, old: dict[str, fx.Node]) -> None:
        merged = f"{next(iter(old))}_and_up"
        sizes = [node.meta["val"].shape[0] for node in old.values()]
        new = replace_parameters(
            program,
            self,
            tuple(old),
            forward=lambda full: {merged: torch.cat([full[name] for name in old])},
            backward=lambda full: dict(zip(old, full[merged].split(sizes), strict=True)),
        )
        gate, up = (next(iter(node.users)) for node in old.values())
        both = insert_before(program, min(gate, up), aten.linear.default, x, new[merged])
        for linear, start in ((gate, 0), (up, sizes[0])):
            stop = start + linear.meta["val"].shape[-1]
            replace_call(program, linear, aten.slice.Tensor, both, -1, start, stop)


def main() -> None:
    """Check the passes, compile a model with two of them, and print what each did."""
    for step in (FuseSwiGLU(), SoftCap(), MergeGateUp()):
        report = check_pass(step)
        print(report, end="\n\n")
        report.raise_if_failed()

    model = internlm2_tiny(num_layers=2)
    reports: list[PassReport] = []
    passes = [FuseSwiGLU(), SoftCap()]
    ilm_compile.partition(model, tp=2, pp=2, passes=passes, callback=reports.append)
    print(*reports, sep="\n", end="\n\n")

    before = trace(model)
    after = copy_program(before)
    run_passes(after, passes)
    print(diff(before, after))


if __name__ == "__main__":
    main()
