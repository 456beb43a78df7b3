"""The plan as a value and as JSON."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ilm_compile import partition
from ilm_compile.errors import PlanError
from ilm_compile.models import internlm2_tiny
from ilm_compile.program.plan import Plan

PLANS = [
    Plan(),
    Plan(
        tp=2,
        pp=4,
        num_chunks=2,
        num_microbatches=8,
        schedule="interleaved_1f1b",
        sequence_parallel=True,
        async_tensor_parallel=True,
        embed_split_hidden=False,
        checkpoint=0.5,
        dtype="bfloat16",
        zero=3,
        seed=7,
    ),
    Plan(checkpoint=True),
]


@pytest.mark.parametrize("plan", PLANS, ids=["default", "everything", "checkpoint"])
def test_json_gives_the_plan_back(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("kind", [str, Path], ids=["str", "Path"])
def test_json_is_read_from_a_file(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(PLANS[1].to_json())
    assert Plan.from_json(kind(tmp_path / "plan.json")) == PLANS[1]


def test_json_with_blanks_in_front_is_text() -> None:
    assert Plan.from_json('\n {"tp": 2}') == Plan(tp=2)


def test_json_may_leave_fields_out() -> None:
    assert Plan.from_json('{"pp": 2, "seed": 3}') == Plan(pp=2, seed=3)


def test_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        PlanError, match=r"unknown option \['tensor'\], known are \['tp', 'cp', 'ep', 'pp', "
    ):
        Plan.from_json('{"tensor": 2}')


@pytest.mark.parametrize("dp", [0, -1, "2"])
def test_a_wrong_number_of_data_parallel_ranks_is_refused(dp) -> None:
    with pytest.raises(PlanError, match=f"dp must be None or a positive integer, got {dp!r}"):
        Plan(dp=dp)


def test_bad_value_in_json_is_refused() -> None:
    with pytest.raises(PlanError, match="tp must be a positive integer, got '2'"):
        Plan.from_json('{"tp": "2"}')


def test_replace_changes_a_copy() -> None:
    plan = Plan(tp=2)
    assert plan.replace(pp=2) == Plan(tp=2, pp=2)
    assert plan == Plan(tp=2)


def test_replace_refuses_an_unknown_field() -> None:
    with pytest.raises(PlanError, match=r"unknown option \['micro_batches', 'tq'\]"):
        Plan().replace(tq=1, micro_batches=2)


def test_plan_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan().tp = 2  # type: ignore[misc]


def test_number_of_stages() -> None:
    assert Plan(pp=4, num_chunks=2).num_stages == 8


@pytest.mark.parametrize("field", ["tp", "pp", "num_chunks", "num_microbatches"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_counts_are_positive_integers(field: str, value: Any) -> None:
    with pytest.raises(PlanError, match=f"plan: {field} must be a positive integer, got {value}"):
        Plan(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"checkpoint": 1.5},
            r"checkpoint must be .* a fraction in \[0, 1\], \"selective\" or \"auto\", got 1.5",
        ),
        (
            {"checkpoint": -0.1},
            r"checkpoint must be .* a fraction in \[0, 1\], \"selective\" or \"auto\", got -0.1",
        ),
        ({"dtype": "float8"}, r"dtype must be one of .*'float16'\), got 'float8'"),
        ({"zero": 2}, "zero must be 1 or 3, got 2"),
        ({"num_chunks": 2}, "num_chunks=2 needs pp > 1, got pp=1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(**fields)


def test_the_hardware_of_a_plan_decides_what_is_predicted() -> None:
    def said(hardware: str) -> str:
        program = partition(internlm2_tiny(num_layers=1), tp=2, hardware=hardware)
        return next(line for line in program.decisions if line.startswith("tensor-parallel"))

    assert len({said(name) for name in ("h100", "a100-80g", "cpu")}) == 3
