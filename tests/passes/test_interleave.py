"""Placement of stages on ranks."""

import pytest

from ilm_compile.errors import PlanError
from ilm_compile.passes import Interleave, PipelineSplit, run_passes
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from tests.support.tiny_model import TinyTransformer


@pytest.fixture
def program() -> Program:
    return trace(TinyTransformer())


def test_stages_go_round_the_ranks(program: Program) -> None:
    run_passes(program, [PipelineSplit(num_stages=4), Interleave(pp=2, num_chunks=2)])
    assert (program.plan.pp, program.plan.num_chunks) == (2, 2)
    assert program.decisions[-2:] == [
        "interleave: pipeline rank 0 runs stages 0, 2",
        "interleave: pipeline rank 1 runs stages 1, 3",
    ]
    assert "placed" in program.facts


def test_refuses_a_split_into_another_number_of_stages(program: Program) -> None:
    with pytest.raises(PlanError, match=r"2 \* 2 needs 4 stages, but .* split into 3; use Pipe"):
        run_passes(program, [PipelineSplit(num_stages=3), Interleave(pp=2, num_chunks=2)])


def test_refuses_chunks_on_one_rank(program: Program) -> None:
    with pytest.raises(PlanError, match="num_chunks=2 needs pp > 1"):
        run_passes(program, [PipelineSplit(num_stages=2), Interleave(pp=1, num_chunks=2)])


def test_refuses_no_rank() -> None:
    with pytest.raises(PlanError, match="must be positive, got pp=0, num_chunks=1"):
        Interleave(pp=0)
