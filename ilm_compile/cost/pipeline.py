"""What the time of a pipeline's step follows from, whatever its schedule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """What a schedule's time follows from: `pp` ranks, `chunks` stages on each, in seconds.

    forward, backward, weight: of one micro-batch on one rank that has neither embedding nor head;
    backward is for the gradient of the input, weight for those of the weights. first, last: what
    the embedding and the head add to the first and the last stage (less than 0 where those have
    fewer layers). again: what each rank recomputes in a backward; none of it if empty. message:
    between neighbours. turns: whether the stages go down the ranks and up again, so that the first
    rank has the last one.
    """

    pp: int
    chunks: int
    num_microbatches: float
    forward: float
    backward: float
    weight: float
    first: float = 0.0
    last: float = 0.0
    again: tuple[float, ...] = ()
    message: float = 0.0
    turns: bool = False

    @property
    def middle(self) -> float:
        """The seconds of a micro-batch on a rank that is neither first nor last."""
        return self.forward + self.backward + self.weight

    @property
    def added(self) -> list[float]:
        """What each rank takes more than `middle`."""
        found = list(self.again) or [0.0] * self.pp
        found[0] += self.first
        found[0 if self.turns else -1] += self.last
        return found

    @property
    def slowest(self) -> float:
        """The seconds of a micro-batch on the slowest rank."""
        return self.middle + max(self.added)

    @property
    def through(self) -> float:
        """The seconds of one micro-batch through all ranks and back, without messages."""
        return self.pp * self.middle + sum(self.added)

    @property
    def average(self) -> float:
        """The seconds for which a rank computes, of them all."""
        return self.num_microbatches * self.through / self.pp

    @property
    def busy(self) -> float:
        """The seconds for which the slowest rank computes."""
        return self.num_microbatches * self.slowest
