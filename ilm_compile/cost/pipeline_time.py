"""Pipeline schedules in closed form: the time of a step and the activations that a rank holds.

What `ilm_compile.schedule.simulate` finds by events for the schedules it can build, without
building them: a search asks this of thousands of plans. Schedules that no formula describes where
forward, backward and weights differ are run, see `ilm_compile.cost.pipeline_lists`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ilm_compile.cost.pipeline import Pipeline
from ilm_compile.cost.pipeline_lists import InFlight, in_flight, spans
from ilm_compile.errors import PlanError


@dataclass(frozen=True, slots=True)
class Form:
    """span: the seconds of a step.

    in_flight: the micro-batches that `rank` holds between forward and backward, and of those whose
    weight part is left, as pairs of which each may be its peak.
    """

    span: Callable[[Pipeline], float]
    in_flight: Callable[[Pipeline, int], Sequence[InFlight]]


def _1f1b(p: Pipeline) -> float:
    # A rank starts one forward for each backward it ends: pp micro-batches share the way there and
    # back, of which the messages are a part.
    way = p.through + 2 * (p.pp - 1) * p.message
    return way + (p.num_microbatches - 1) * max(p.slowest, way / p.pp)


def _looped(p: Pipeline) -> float:
    # Up to a tenth too long where first ranks recompute more than others, whose bubble is smaller.
    bubble = (p.through - p.slowest) / p.chunks
    return p.busy + bubble + 2 * (p.pp * p.chunks - 1) * p.message


def _breadth_first(p: Pipeline) -> float:
    # From the last rank to the first again, messages of many micro-batches hide.
    hidden = 2 * p.pp * (p.chunks - 1) if p.num_microbatches > p.pp else 0
    return _looped(p) - hidden * p.message


def _zero_bubble(weights: int, messages: int) -> Callable[[Pipeline], float]:
    """1F1B that fills its bubble with `weights` weight parts for each rank that follows.

    The second of two takes another forward in advance, for which there must be micro-batches.
    """

    def span(p: Pipeline) -> float:
        spare = 1 + (p.num_microbatches - p.pp) / max(1, p.pp - 1)
        filled = min(weights, max(1.0, spare)) * p.weight
        bubble = (p.pp - 1) * max(0.0, p.forward + p.backward - filled)
        return p.busy + bubble + messages * (p.pp - 1) * p.message

    return span


def _zero_bubble_v(p: Pipeline) -> float:
    # Down and up again, a rank has work of its second stage while its first one waits.
    spare = (p.num_microbatches - p.pp) / max(1, p.pp - 1)
    bubble = (p.pp - 1) * max(0.0, p.backward - min(1.0, max(0.0, spare)) * p.weight)
    return p.busy + bubble + 5 * (p.pp - 1) * p.message


def _alive(most: Callable[[Pipeline, int], float]) -> Callable[[Pipeline, int], list[InFlight]]:
    """As many micro-batches as `most` says, as far as there are any; backwards are whole."""
    return lambda p, rank: [(min(p.num_microbatches, most(p, rank)), 0.0)]


def _zero_bubble_alive(hops: int) -> Callable[[Pipeline, int], list[InFlight]]:
    """A rank delays its weight parts by as many backwards as it has ranks before it, or twice."""

    def in_flight(p: Pipeline, rank: int) -> list[InFlight]:
        alive = min(p.num_microbatches, hops * (p.pp - 1 - rank) + 1)
        left = min(p.num_microbatches - alive, float(hops * rank))
        most = min(p.num_microbatches, hops * rank + 1.0)  # while a weight part runs
        return [(alive, left), (min(alive - 1, p.num_microbatches - most), most)]

    return in_flight


def _listed(schedule: str) -> Form:
    return Form(lambda p: spans(schedule, [p])[0], lambda p, rank: in_flight(schedule, p)[rank])


LISTED = ("v_half", "v_min", "dualpipe_v")
FORMS: Mapping[str, Form] = {
    "gpipe": Form(_breadth_first, _alive(lambda p, rank: p.num_microbatches)),
    "1f1b": Form(_1f1b, _alive(lambda p, rank: p.pp - rank)),
    "interleaved_1f1b": Form(
        _looped,
        _alive(lambda p, rank: ((p.chunks - 1) * p.pp + 2 * (p.pp - 1 - rank) + 1) / p.chunks),
    ),
    "zb_h1": Form(_zero_bubble(1, 4), _zero_bubble_alive(1)),
    "zb_h2": Form(_zero_bubble(2, 2), _zero_bubble_alive(2)),
    "zb_v": Form(_zero_bubble_v, lambda p, rank: in_flight("zb_v", p)[rank]),
    **{name: _listed(name) for name in LISTED},
    # The automatic schedules of the Zero Bubble paper, which fill the limit they are given.
    "zb_1p": Form(_zero_bubble(1, 4), _alive(lambda p, rank: p.pp)),
    "zb_2p": Form(_zero_bubble(2, 2), _alive(lambda p, rank: 2 * p.pp)),
}


def form(schedule: str) -> Form:
    """Return the row of `FORMS`; raises `PlanError` naming those that are known."""
    if schedule not in FORMS:
        raise PlanError(f"cost: unknown schedule {schedule!r}; known are {', '.join(FORMS)}")
    return FORMS[schedule]
