"""The peak of a rank is predicted within 3%, and the benchmark meets every schedule."""

from pathlib import Path

from benchmarks.peak_memory import BOUND, Peak, measure, name_of, plans
from ilm_compile.program.plan import Plan
from ilm_compile.schedule import known_schedules
from tests.support.world import World


def test_every_schedule_is_tried(tmp_path: Path) -> None:
    tried = list(plans(tmp_path, ["selective"]))
    assert [name_of(plan) for plan in tried] == [*known_schedules(), "found"]


def run(rank: int, plans: list[Plan]) -> list[Peak]:
    return measure(plans)


def test_peaks_are_predicted(tmp_path: Path, world2: World) -> None:
    named = {name_of(plan): plan for plan in plans(tmp_path, ["selective"])}
    chosen = [named["1f1b"], named["zb_h1"].replace(checkpoint=False)]
    for peak in (peak for rank in world2.run(run, chosen) for peak in rank):
        assert abs(peak.error) < BOUND, peak
