"""Translation validation: each pass's output against its input, as an option of the manager."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch

import ilm_compile
from examples.custom_pass import FuseSwiGLU, MergeGateUp, SoftCap
from ilm_compile.errors import PlanError, ProgramError
from ilm_compile.models import internlm2_20b, internlm2_tiny
from ilm_compile.passes import Pass, run_passes, wrap
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace

aten = torch.ops.aten


def make_model():
    return internlm2_tiny(num_layers=2)


@pytest.mark.parametrize(
    "plan",
    [
        {"tp": 2, "sequence_parallel": True, "checkpoint": True},
        {"tp": 2, "pp": 2, "dtype": torch.bfloat16},
        {"pp": 2, "num_chunks": 2, "num_microbatches": 4},
    ],
    ids=str,
)
def test_the_standard_passes_preserve_what_they_say(plan):
    for step in (FuseSwiGLU(), MergeGateUp()):
        passes = [step, SoftCap()]
        ilm_compile.partition(make_model(), passes=passes, validate="numerics", **plan)


@dataclass(frozen=True, kw_only=True)
class Meddle(Pass):
    """Does `what` to the first SwiGLU's gate."""

    name: ClassVar[str] = "meddle"
    what: str = "value"
    after: ClassVar[frozenset[str]] = frozenset({"sharded"})

    def apply(self, program: Program) -> None:
        node = next(n for n in program.calls() if n.target is aten.silu.default)
        changes = {
            "value": lambda x: x * 1.001,
            "gradient": lambda x: x * 2 - x.detach(),
            "nothing": lambda x: x * 1,
        }
        wrap(program, node, changes[self.what])


class Declared(Meddle):
    name: ClassVar[str] = "declared"
    numerics: ClassVar[Literal["preserving", "changing"]] = "changing"
    tolerance: ClassVar[float] = 1e-9


@pytest.mark.parametrize("plan", [{}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("what", ["value", "gradient"])
def test_a_pass_that_computes_something_else_is_named_with_the_node(what, plan):
    with pytest.raises(ProgramError, match=rf"pass meddle: .*first {what} that differs.*layers\.0"):
        ilm_compile.partition(make_model(), passes=[Meddle(what=what)], validate="numerics", **plan)


@pytest.mark.parametrize("validate", ["types", None])
def test_types_alone_do_not_see_numbers(validate):
    ilm_compile.partition(make_model(), passes=[Meddle()], validate=validate)


def test_a_pass_may_move_the_loss_by_its_tolerance_only():
    passes = [Declared(what="value")]
    with pytest.raises(ProgramError, match=r"pass declared: .*move loss by 1e-09.*moved it by"):
        ilm_compile.partition(make_model(), passes=passes, validate="numerics")
    passes = [Declared(what="nothing")]
    ilm_compile.partition(make_model(), passes=passes, validate="numerics")


def test_nothing_is_checked_if_so_asked():
    program = trace(make_model())

    @dataclass(frozen=True, kw_only=True)
    class Untidy(Pass):
        name: ClassVar[str] = "untidy"

        def apply(self, program: Program) -> None:
            next(program.calls()).meta.pop("region")

    with pytest.raises(ProgramError, match=r"untidy: .*no region"):
        run_passes(program, [Untidy()])
    run_passes(trace(make_model()), [Untidy()], validate=None)


def test_a_program_too_big_to_run_is_run_with_smaller_sizes():
    with torch.device("meta"):
        model = internlm2_20b(num_layers=2)
    ilm_compile.partition(model, tp=8, validate="numerics")
    with pytest.raises(ProgramError, match=r"pass meddle: .*first value that differs.*layers\.0"):
        ilm_compile.partition(model, tp=8, passes=[Meddle()], validate="numerics")


def test_an_unknown_way_is_refused():
    with pytest.raises(PlanError, match=r"'types', 'numerics'.* got 'numeric'"):
        ilm_compile.partition(make_model(), validate="numeric")
