"""The compiler's own time: every part is measured, and a missed goal is seen."""

from typing import Any

import pytest

from benchmarks.common import make_model
from benchmarks.partition_time import measure, show
from ilm_compile import partitioning as front_door


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    model = make_model("internlm2_tiny", {"num_layers": 2, "max_seq_len": 16})
    return measure(model, {"tp": 2, "pp": 2}, seq=16)


@pytest.mark.parametrize("times", ["seconds", "cpu_seconds"])
def test_the_parts_lie_within_the_whole(figures: dict[str, Any], times: str) -> None:
    parts = dict(figures[times])
    whole = parts.pop("whole")
    assert set(parts) == {"trace", "solve", "rewrite"}
    assert min(parts.values()) >= 0
    assert sum(parts.values()) <= whole + 0.01  # each is rounded to a millisecond


def test_what_was_watched_is_put_back(figures: dict[str, Any]) -> None:
    assert not hasattr(front_door.trace, "__wrapped__")


@pytest.mark.parametrize(("goal", "marked"), [(0.0, True), (1e9, False)])
def test_a_missed_goal_is_marked(
    figures: dict[str, Any], goal: float, marked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"name": "tiny", "plan": {"tp": 2}, "goals": {"whole": goal}, **figures}
    show([row])
    assert ("!" in capsys.readouterr().out) == marked
