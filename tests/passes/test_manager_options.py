"""The manager's aids: passes left out by name, passes that come before, and what reports say."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

import ilm_compile
from ilm_compile.errors import PlanError
from ilm_compile.models import internlm2_tiny
from ilm_compile.passes import (
    ActivationCheckpoint,
    Interleave,
    Pass,
    PassReport,
    PipelineSplit,
    TensorParallel,
    communication_bytes,
    order_passes,
    run_passes,
)
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace


@dataclass(frozen=True, kw_only=True)
class Early(Pass):
    """Must see the program before it is sharded."""

    name: ClassVar[str] = "early"
    before: ClassVar[frozenset[str]] = frozenset({"sharded"})

    def apply(self, program: Program) -> None:
        program.decisions.append("early: done")


@pytest.fixture
def program() -> Program:
    return trace(internlm2_tiny(num_layers=2))


def test_disabled_pass_does_not_run(program: Program) -> None:
    run_passes(program, [Early(), ActivationCheckpoint(fraction=True)], disable=["early"])
    assert [line.split(":")[0] for line in program.pass_log] == ["activation-checkpoint"]


def test_partition_disables_standard_passes() -> None:
    model = internlm2_tiny(num_layers=2)
    program = ilm_compile.partition(model, checkpoint=True, disable=("activation-checkpoint",))
    assert not any(region.recompute for region in program.regions)
    assert "activation-checkpoint" not in "".join(program.pass_log)


def test_unknown_name_lists_the_passes(program: Program) -> None:
    with pytest.raises(PlanError, match=r"cannot disable \['erly'\].*are \['early'\]"):
        run_passes(program, [Early()], disable=["erly"])


def test_name_alone_is_not_a_collection_of_names(program: Program) -> None:
    with pytest.raises(PlanError, match="must be a collection of names, got 'early'"):
        run_passes(program, [Early()], disable="early")


def test_requirements_of_the_others_are_still_checked(program: Program) -> None:
    passes = [PipelineSplit(num_stages=2), Interleave(pp=2)]
    with pytest.raises(PlanError, match="interleave requires 'split'"):
        run_passes(program, passes, disable=["pipeline-split"])


def test_before_puts_a_pass_first_wherever_it_was_given() -> None:
    order = order_passes([TensorParallel(size=2), Early()], {"traced"})
    assert [step.name for step in order] == ["early", "tensor-parallel"]


def test_before_a_fact_that_holds_already(program: Program) -> None:
    run_passes(program, [TensorParallel(size=2)])
    with pytest.raises(PlanError, match=r"early must run before \['sharded'\].*already"):
        run_passes(program, [Early()])


def test_report_counts_the_bytes_of_communication(program: Program) -> None:
    reports: list[PassReport] = []
    run_passes(
        program, [ActivationCheckpoint(fraction=1), TensorParallel(size=2)], callback=reports.append
    )
    sent = communication_bytes(program)
    assert sent > 0
    assert [(r.communication_before, r.communication_after) for r in reports] == [(0, 0), (0, sent)]


def test_report_is_one_readable_line() -> None:
    report = PassReport(
        name="fuse",
        seconds=0.0123,
        nodes_before=10,
        nodes_after=9,
        added=("a",),
        removed=("b", "c"),
        communication_before=0.0,
        communication_after=2048.0,
    )
    expected = "fuse: 12.3 ms, 10 -> 9 nodes (+1, -2), 0 -> 2,048 bytes sent per micro-batch"
    assert str(report) == expected
