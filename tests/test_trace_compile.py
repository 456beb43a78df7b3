"""`trace` and `compile`: one trace serves many plans, and a plan holds its passes as text."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import ilm_compile
from ilm_compile.errors import PlanError
from ilm_compile.models import internlm2_tiny
from ilm_compile.passes import FuseKernels, Pass
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program

PLANS: dict[str, dict[str, Any]] = {
    "tp": {"tp": 2},
    "cp and pp": {"cp": 2, "pp": 2},
    "bf16": {"dtype": torch.bfloat16, "checkpoint": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class Note(Pass):
    """Writes a line."""

    name: ClassVar[str] = "note-of-this-test"
    text: str
    times: int = 1

    def apply(self, program: Program) -> None:
        program.decisions += [f"{self.name}: {self.text}"] * self.times


NOTE = Note(text="a, b=(1, 2) {c} 'd'", times=2)
WRITTEN = """note-of-this-test{text="a, b=(1, 2) {c} 'd'", times=2}"""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return internlm2_tiny(num_layers=2)


@pytest.fixture(scope="module")
def traced(model: nn.Module) -> Program:
    return ilm_compile.trace(model)


@pytest.mark.parametrize("plan", PLANS)
def test_compile_is_partition(plan: str, model: nn.Module, traced: Program) -> None:
    before = traced.dump()
    compiled = ilm_compile.compile(traced, **PLANS[plan])
    apart = ilm_compile.partition(model, **PLANS[plan])
    assert compiled.dump() == apart.dump()
    assert compiled.explain() == apart.explain()
    assert traced.dump() == before


def test_what_is_compiled_is_not_compiled_again(traced: Program) -> None:
    compiled = ilm_compile.compile(traced, tp=2)
    with pytest.raises(PlanError, match=r"expected a program as trace\(\) made it, got .*sharded"):
        ilm_compile.compile(compiled, tp=2)


class Squared(nn.Module):
    """A loss that is counted in the whole batch, which takes another trace to see."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        loss = (self.table(ids).sum(-1) - labels) ** 2
        mask = labels > 2
        return (loss * mask).sum() / mask.sum()


def test_a_loss_is_made_right_for_each_plan_and_not_in_the_trace() -> None:
    example = {"ids": ((4, 6), torch.int64), "labels": ((4, 6), torch.int64)}
    traced = ilm_compile.trace(Squared(), example_inputs=example)
    counted = ilm_compile.compile(traced, num_microbatches=2).target_counts
    alone = ilm_compile.compile(traced, num_microbatches=1).target_counts
    assert counted
    assert not alone
    assert not traced.target_counts


def test_plan_holds_passes_and_names_left_out(traced: Program) -> None:
    program = ilm_compile.compile(traced, passes=[NOTE], disable=["activation-checkpoint"])
    assert program.plan.passes == (WRITTEN,)
    again = ilm_compile.compile(traced, Plan.from_json(program.plan.to_json()))
    assert again.plan == program.plan
    assert again.decisions == program.decisions
    assert again.decisions.count(f"{NOTE.name}: {NOTE.text}") == 2
    assert "checkpointed" not in again.facts


def test_a_pass_wins_over_the_text_of_its_name(traced: Program) -> None:
    plan = Plan(passes=("note-of-this-test{text='old'}",))
    program = ilm_compile.compile(traced, plan, passes=[NOTE])
    assert program.plan.passes == (WRITTEN,)


@dataclass(frozen=True, kw_only=True)
class Call(Pass):
    """Has an option that no text can hold."""

    name: ClassVar[str] = "call-of-this-test"
    function: Any

    def apply(self, program: Program) -> None:
        self.function(program)


def test_a_pass_with_an_option_that_is_no_literal_runs_and_is_proven(traced: Program) -> None:
    step = Call(function=lambda program: program.decisions.append("called"))
    assert "called" in ilm_compile.compile(traced, passes=[step]).decisions
    model = internlm2_tiny(num_layers=2).double()
    ilm_compile.verify(model, passes=[step]).raise_if_failed()
    with pytest.raises(PlanError, match="cannot be read"):
        ilm_compile.compile(traced, passes=[str(step)])


def test_the_proof_runs_the_passes_of_a_plan(model: nn.Module) -> None:
    plan = Plan(passes=("fuse-kernels",), kernels="torch")
    report = ilm_compile.verify(internlm2_tiny(num_layers=2).double(), plan=plan)
    report.raise_if_failed()
    assert "fuse-kernels" in str(ilm_compile.partition(model, plan=plan).pass_log)


def test_options_of_the_default_are_not_written() -> None:
    assert str(FuseKernels()) == "fuse-kernels"


REFUSED = {
    "soft cap": "expected a pass as in",
    "not-a-pass": "no pass 'not-a-pass' is known; import the module that defines it",
    "note-of-this-test{text=open('x')}": "cannot be read: malformed node",
    "note-of-this-test{'text'}": "cannot be read: expected options as name=value",
    "note-of-this-test{word='x'}": "cannot be read: .*word",
    "note-of-this-test{text=}": "cannot be read: (invalid syntax|expected argument)",
    "pipeline-split{num_stages=0}": "pipeline-split: ",
}


@pytest.mark.parametrize("text", REFUSED)
def test_text_that_is_no_pass_is_refused(text: str, traced: Program) -> None:
    with pytest.raises(PlanError, match=REFUSED[text]):
        ilm_compile.compile(traced, passes=[text])


@pytest.mark.parametrize("field", ["passes", "disable"])
def test_a_text_alone_is_no_collection(field: str) -> None:
    with pytest.raises(PlanError, match=f"plan: {field} must be a collection of texts, got 'x'"):
        Plan(**{field: "x"})
