"""Pipeline schedules in closed form: the time of a step and the activations that a rank holds.

What `ilm_compile.schedule.simulate` finds by events for the schedules it can build, without
building them: a search asks this of thousands of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ilm_compile.errors import PlanError


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """What a schedule's time follows from: `pp` ranks, `chunks` stages on each, in seconds.

    forward, backward, weight: of one micro-batch on one rank that has neither embedding nor head;
    backward is for the gradient of the input, weight for those of the weights. first, last: what
    the embedding and the head add to the first and the last rank (less than 0 where those have
    fewer layers). message: between neighbours.
    """

    pp: int
    chunks: int
    num_microbatches: float
    forward: float
    backward: float
    weight: float
    first: float = 0.0
    last: float = 0.0
    message: float = 0.0

    @property
    def middle(self) -> float:
        """The seconds of a micro-batch on a rank that is neither first nor last."""
        return self.forward + self.backward + self.weight

    @property
    def slowest(self) -> float:
        """The seconds of a micro-batch on the slowest rank."""
        ends = self.first + self.last if self.pp == 1 else max(self.first, self.last)
        return self.middle + (max(0.0, ends) if self.pp > 2 else ends)

    @property
    def through(self) -> float:
        """The seconds of one micro-batch through all ranks and back, without messages."""
        return self.pp * self.middle + self.first + self.last

    @property
    def busy(self) -> float:
        """The seconds for which the slowest rank computes."""
        return self.num_microbatches * self.slowest


@dataclass(frozen=True, slots=True)
class Form:
    """span: the seconds of a step. in_flight: the micro-batches whose activations `rank` holds."""

    span: Callable[[Pipeline], float]
    in_flight: Callable[[Pipeline, int], float]


def _gpipe(p: Pipeline) -> float:
    return p.busy + p.through - p.slowest + 2 * (p.pp - 1) * p.message


def _1f1b(p: Pipeline) -> float:
    # A rank starts one forward for each backward it ends: pp micro-batches share the way there and
    # back, of which the messages are a part.
    way = p.through + 2 * (p.pp - 1) * p.message
    return way + (p.num_microbatches - 1) * max(p.slowest, way / p.pp)


def _interleaved(p: Pipeline) -> float:
    bubble = (p.through - p.slowest) / p.chunks
    return p.busy + bubble + 2 * (p.pp * p.chunks - 1) * p.message


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


def _in_flight_interleaved(p: Pipeline, rank: int) -> float:
    ahead = (p.chunks - 1) * p.pp + 2 * (p.pp - 1 - rank) + 1
    return min(p.num_microbatches, ahead / p.chunks)


FORMS: Mapping[str, Form] = {
    "gpipe": Form(_gpipe, lambda p, rank: p.num_microbatches),
    "1f1b": Form(_1f1b, lambda p, rank: min(p.num_microbatches, p.pp - rank)),
    "interleaved_1f1b": Form(_interleaved, _in_flight_interleaved),
    "zb_h1": Form(_zero_bubble(1, 4), lambda p, rank: min(p.num_microbatches, p.pp)),
    "zb_h2": Form(_zero_bubble(2, 2), lambda p, rank: min(p.num_microbatches, 2 * p.pp - 1)),
    "zb_v": Form(_zero_bubble_v, lambda p, rank: min(p.num_microbatches, p.pp)),
    # The automatic schedules of the Zero Bubble paper, which fill the limit they are given.
    "zb_1p": Form(_zero_bubble(1, 4), lambda p, rank: min(p.num_microbatches, p.pp)),
    "zb_2p": Form(_zero_bubble(2, 2), lambda p, rank: min(p.num_microbatches, 2 * p.pp)),
}


def form(schedule: str) -> Form:
    """Return the row of `FORMS`; raises `PlanError` naming those that are known."""
    if schedule not in FORMS:
        raise PlanError(f"cost: unknown schedule {schedule!r}; known are {', '.join(FORMS)}")
    return FORMS[schedule]
