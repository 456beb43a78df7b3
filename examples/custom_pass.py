"""Passes of your own: one fuses SwiGLU into one op, one soft-caps the logits.

`python -m examples.custom_pass` checks both on the zoo of small models and plans, compiles an
InternLM2 with them, and prints what they changed. docs/custom_passes.md goes through this file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import ilm_compile
from ilm_compile.errors import PlanError
from ilm_compile.models import internlm2_tiny
from ilm_compile.passes import Pass, PassReport, replace, run_passes, wrap
from ilm_compile.program.copy import copy_program
from ilm_compile.program.diff import diff
from ilm_compile.program.placement import Placement
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.sharding import Call, Strategy, rule
from ilm_compile.verify.check_pass import check_pass

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


def main() -> None:
    """Check both passes, compile a model with them, and print what each did."""
    for step in (FuseSwiGLU(), SoftCap()):
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
