"""The pass manager: order, checks, reports, and what it says when something is wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from ilm_compile.errors import PlanError, ProgramError
from ilm_compile.passes import (
    ActivationCheckpoint,
    CastBF16,
    Interleave,
    Pass,
    PassReport,
    PipelineSplit,
    TensorParallel,
    order_passes,
    run_passes,
)
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from tests.support.tiny_model import TinyTransformer

aten = torch.ops.aten


def make_pass(
    name: str, apply: Callable[[Program], None] = lambda program: None, **facts: Any
) -> Pass:
    """A pass with the given facts, each a set of strings."""
    body: dict[str, Any] = {"name": name, "apply": lambda self, program: apply(program)}
    body |= {key: frozenset(value) for key, value in facts.items()}
    return type(name, (Pass,), body)()


@pytest.fixture
def program() -> Program:
    return trace(TinyTransformer(num_blocks=2))


def names(passes: list[Pass]) -> list[str]:
    return [step.name for step in passes]


def test_built_in_passes_sort_into_their_natural_order() -> None:
    shuffled = [
        Interleave(pp=2),
        PipelineSplit(num_stages=2),
        ActivationCheckpoint(fraction=True),
        CastBF16(),
        TensorParallel(size=1),
    ]
    order = names(order_passes(shuffled, {"traced"}))
    assert order.index("tensor-parallel") < order.index("cast-bf16") < order.index("pipeline-split")
    assert order.index("activation-checkpoint") < order.index("pipeline-split")
    assert order[-1] == "interleave"


def test_independent_passes_keep_the_given_order() -> None:
    given = [make_pass(name, requires={"traced"}) for name in ("c", "a", "b")]
    assert names(order_passes(given, {"traced"})) == ["c", "a", "b"]


def test_after_orders_only_if_the_provider_is_there() -> None:
    late = make_pass("late", requires=set(), after={"x"})
    assert names(order_passes([late])) == ["late"]
    assert names(order_passes([late, make_pass("early", requires=set(), ensures={"x"})])) == [
        "early",
        "late",
    ]


def test_unmet_requirement_names_who_could_meet_it() -> None:
    with pytest.raises(
        PlanError, match=r"interleave requires 'split'.*add ChooseStages or PipelineSplit"
    ):
        order_passes([Interleave(pp=2)], {"traced"})


def test_requirement_nobody_can_meet() -> None:
    with pytest.raises(PlanError, match=r"lonely requires 'magic'.*no known pass"):
        order_passes([make_pass("lonely", requires={"magic"})])


def test_circle_is_named() -> None:
    circle = [
        make_pass("chicken", requires={"an egg"}, ensures={"a hen"}),
        make_pass("egg", requires={"a hen"}, ensures={"an egg"}),
    ]
    with pytest.raises(PlanError, match="chicken -> egg -> chicken need each other in a circle"):
        order_passes(circle)


def test_one_pass_given_twice() -> None:
    with pytest.raises(PlanError, match=r"each pass once, got \['cast-bf16'\] twice"):
        order_passes([CastBF16(), CastBF16()], {"traced"})


def test_report_and_facts(program: Program) -> None:
    def negate_twice(program: Program) -> None:
        loss = program.graph.output_node().args[0][0]  # type: ignore[index]
        for _ in range(2):
            with program.graph.inserting_before(program.graph.output_node()):
                negative = program.graph.call_function(aten.neg.default, (loss,))
            negative.meta = dict(loss.meta)
            loss = negative
        program.graph.output_node().args = ((loss, *program.graph.output_node().args[0][1:]),)  # type: ignore[index]

    reports: list[PassReport] = []
    before = len(program.graph.nodes)
    run_passes(
        program, [make_pass("negate", negate_twice, ensures={"positive"})], callback=reports.append
    )
    (report,) = reports
    assert (report.name, report.nodes_before, report.nodes_after) == ("negate", before, before + 2)
    assert (len(report.added), report.removed) == (2, ())
    assert report.seconds > 0
    assert "positive" in program.facts
    assert program.pass_log == [f"negate: {before} -> {before + 2} nodes (+2, -0)"]


def test_error_in_a_pass_names_the_pass(program: Program) -> None:
    def fail(program: Program) -> None:
        raise KeyError("lost")

    with pytest.raises(ProgramError, match="pass clumsy: KeyError: 'lost'"):
        run_passes(program, [make_pass("clumsy", fail)])


def test_broken_program_names_the_pass_that_broke_it(program: Program) -> None:
    def forget_regions(program: Program) -> None:
        for node in program.calls():
            del node.meta["region"]

    with pytest.raises(ProgramError, match=r"pass forgetful: .*no region.* at node"):
        run_passes(program, [make_pass("forgetful", forget_regions, ensures={"done"})])


def test_refusal_of_a_plan_stays_a_plan_error(program: Program) -> None:
    with pytest.raises(PlanError, match=r"^pipeline-split: pp"):
        run_passes(program, [PipelineSplit(num_stages=99)])


def test_a_pass_of_ones_own_is_a_frozen_dataclass(program: Program) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Note(Pass):
        """Write a sentence."""

        name: ClassVar[str] = "note"
        text: str

        def apply(self, program: Program) -> None:
            program.decisions.append(f"{self.name}: {self.text}")

    run_passes(program, [Note(text="hello")])
    assert program.decisions == ["note: hello"]
