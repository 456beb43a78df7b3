"""A pipeline schedule as data: for every rank the list of actions it runs, in order.

A schedule says nothing about tensors or processes. Whether its lists fit together is proven by
`check`; a `Schedule` may hold a wrong one, so that a wrong one can be looked at.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TextIO

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule.actions import RECV_OF, SEND_OF, Action, Kind
from ilm_compile.schedule.timeline import grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What each rank does in one step of training or inference.

    stage_to_rank: the rank on which each stage lives.
    actions: one tuple per rank, in the order in which the rank runs them.
    """

    name: str
    num_microbatches: int
    stage_to_rank: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        for stage, rank in enumerate(self.stage_to_rank):
            if not 0 <= rank < self.num_ranks:
                raise ScheduleError(
                    f"schedule {self.name!r}: stage {stage} is placed on rank {rank}, expected "
                    f"0 to {self.num_ranks - 1}; give one row of actions per rank"
                )

    @property
    def num_stages(self) -> int:
        return len(self.stage_to_rank)

    @property
    def num_ranks(self) -> int:
        return len(self.actions)

    @property
    def splits_backwards(self) -> bool:
        """Whether the gradients of the weights are left for actions of their own."""
        return any(action.kind is Kind.W for row in self.actions for action in row)

    def splits(self, stage: int) -> bool:
        """Whether anything runs between the backward of a micro-batch of `stage` and its W.

        Nothing does on the first stage of some schedules, which sends no gradient: a backward that
        finds both at once is cheaper.
        """
        row = self.actions[self.stage_to_rank[stage]]
        return any(
            action.kind is Kind.W
            and action.stage == stage
            and before != Action(stage, Kind.B, action.microbatch)
            for before, action in pairwise(row)
        )

    @property
    def frees(self) -> Kind:
        """The action after which a stage holds nothing of a micro-batch, its last one."""
        return Kind.W if self.splits_backwards else Kind.B

    @classmethod
    def from_rows(cls, name: str, rows: Iterable[Sequence[Action]]) -> "Schedule":
        """The schedule with these rows; a stage lives on the first rank that runs its forward."""
        actions = tuple(tuple(row) for row in rows)
        ranks: dict[int, int] = {}
        for rank, row in enumerate(actions):
            for action in row:
                if action.kind is Kind.F:
                    ranks.setdefault(action.stage, rank)
        last = max((action.stage for row in actions for action in row), default=0)
        for stage in range(last + 1):
            if stage not in ranks:
                raise ScheduleError(
                    f"schedule {name!r}: no rank runs a forward of stage {stage}; every stage "
                    f"from 0 to {last} needs one for each micro-batch"
                )
        return cls(
            name=name,
            num_microbatches=1 + max(action.microbatch for row in actions for action in row),
            stage_to_rank=tuple(ranks[stage] for stage in range(len(ranks))),
            actions=actions,
        )

    def sends(self, action: Action) -> tuple[Action, ...]:
        """The sends that the result of the compute `action` needs: one, or none."""
        return self._message(action, SEND_OF)

    def receives(self, action: Action) -> tuple[Action, ...]:
        """The receives that the compute `action` needs: one, or none."""
        return self._message(action, RECV_OF)

    def peer(self, action: Action) -> int:
        """The rank at the other end of a send or receive."""
        return self.stage_to_rank[action.partner.stage]

    def _message(self, action: Action, kinds: dict[Kind, Kind]) -> tuple[Action, ...]:
        if action.kind not in kinds:
            return ()
        message = Action(action.stage, kinds[action.kind], action.microbatch)
        if not 0 <= message.partner.stage < self.num_stages:
            return ()
        # Stages that follow each other on one rank hand over their tensors in memory.
        return (message,) if self.peer(message) != self.stage_to_rank[action.stage] else ()

    def compute_only(self) -> "Schedule":
        """The same schedule without its sends and receives."""
        rows = (tuple(action for action in row if action.is_compute) for row in self.actions)
        return replace(self, actions=tuple(rows))

    def grid(self) -> str:
        """The compute actions as text, rank by time step; a backward takes two steps."""
        return grid(self.compute_only().actions, self.num_stages)

    def to_csv(self, target: str | PathLike[str] | TextIO) -> None:
        """Write one row of actions per rank, as torch.distributed.pipelining reads them.

        With sends and receives this is torch's "compute_comms" format, without them its
        "compute_only" format.
        """
        if isinstance(target, str | PathLike):
            with Path(target).open("w", newline="") as file:
                return self.to_csv(file)
        csv.writer(target, lineterminator="\n").writerows(self.actions)

    @classmethod
    def from_csv(cls, source: str | PathLike[str] | TextIO, *, name: str = "csv") -> "Schedule":
        """Read either format of `to_csv`. Empty cells, torch's idle steps, are skipped."""
        if isinstance(source, str | PathLike):
            with Path(source).open(newline="") as file:
                return cls.from_csv(file, name=name)
        rows = [[Action.parse(c.strip()) for c in row if c.strip()] for row in csv.reader(source)]
        return cls.from_rows(name, rows)


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """For each rank, how many forwards wait for their backward at once, at most.

    The unit is the activations of one micro-batch in one stage. A backward frees them, or its
    weight part where the schedule splits it off. 1F1B: min(num_microbatches, pp - rank).
    """
    change = {Kind.F: +1, schedule.frees: -1}

    def peak(row: Sequence[Action]) -> int:
        live = highest = 0
        for action in row:
            live += change.get(action.kind, 0)
            highest = max(highest, live)
        return highest

    return tuple(peak(row) for row in schedule.actions)
