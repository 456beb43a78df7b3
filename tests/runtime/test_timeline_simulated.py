"""The step that is simulated from what was measured."""

from ilm_compile.runtime.observe.timeline_picture import compute_rows, simulated
from ilm_compile.schedule import Action, StageTimes, build, simulate


def test_simulated_is_what_was_measured_where_all_takes_its_median() -> None:
    schedule = build("zb_h1", pp=2, num_microbatches=3)
    times = [
        StageTimes(forward=2.0, backward=3.0, weight=1.0),
        StageTimes(forward=1.0, backward=4.0, weight=2.0),
    ]
    spans = simulate(schedule, times).spans
    measured = {
        a: (5 + spans[a].start, 5 + spans[a].stop) for row in compute_rows(schedule) for a in row
    }
    assert simulated(schedule, measured) == measured
    slow = Action.parse("1B0")
    measured[slow] = (measured[slow][0], measured[slow][1] + 0.5)
    assert simulated(schedule, measured)[slow][1] == spans[slow].stop + 5
