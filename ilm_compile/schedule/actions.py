"""One step of one rank in a pipeline schedule, in the text form of torch.distributed.pipelining.

`2F0` is the forward of stage 2 on micro-batch 0. The stage of an action is always the stage on
whose rank it runs: `1SEND_F3` sends the output of stage 1 to stage 2, `1RECV_F3` receives the
input of stage 1 from stage 0, `1SEND_B3` sends the gradient of that input back to stage 0, and
`1RECV_B3` receives the gradient of stage 1's output from stage 2.
"""

import re
from enum import StrEnum
from typing import NamedTuple

from ilm_compile.errors import ScheduleError


class Kind(StrEnum):
    """What an action does. `W` is the weight part of a backward, where `B` leaves it for later."""

    F = "F"
    B = "B"
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"

    __hash__ = str.__hash__  # not Enum's, which is written in Python: actions are keys everywhere


SEND_OF = {Kind.F: Kind.SEND_F, Kind.B: Kind.SEND_B}
RECV_OF = {Kind.F: Kind.RECV_F, Kind.B: Kind.RECV_B}

# The other end of a message: its kind, and how many stages further it is.
_PARTNER = {
    Kind.SEND_F: (Kind.RECV_F, +1),
    Kind.RECV_F: (Kind.SEND_F, -1),
    Kind.SEND_B: (Kind.RECV_B, -1),
    Kind.RECV_B: (Kind.SEND_B, +1),
}

_NUMBER = "(0|[1-9][0-9]*)"
_TEXT = re.compile(f"{_NUMBER}({'|'.join(Kind)}){_NUMBER}")


class Action(NamedTuple):
    """One compute, send or receive of one stage for one micro-batch."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The action that `text` spells, e.g. "2F0"; the whole text must match."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ScheduleError(
                f"{text!r} is not a schedule action; expected stage, kind and micro-batch as in "
                f"'2F0' or '1SEND_F3', the kind one of {', '.join(Kind)}"
            )
        stage, kind, microbatch = match.groups()
        return cls(int(stage), Kind(kind), int(microbatch))

    @property
    def is_compute(self) -> bool:
        return self.kind not in _PARTNER

    @property
    def is_send(self) -> bool:
        return self.kind in SEND_OF.values()

    @property
    def is_recv(self) -> bool:
        return self.kind in RECV_OF.values()

    @property
    def partner(self) -> "Action":
        """The receive that matches this send, or the send that matches this receive."""
        kind, step = _PARTNER[self.kind]
        return Action(self.stage + step, kind, self.microbatch)


def producers(action: Action, num_stages: int) -> list[Action]:
    """The compute actions whose results the compute `action` needs, on any rank."""
    stage, microbatch = action.stage, action.microbatch
    forward, backward = Action(stage, Kind.F, microbatch), Action(stage, Kind.B, microbatch)
    if action.kind is Kind.F:
        return [Action(stage - 1, Kind.F, microbatch)] if stage > 0 else []
    if action.kind is Kind.B:
        downstream = [Action(stage + 1, Kind.B, microbatch)] if stage + 1 < num_stages else []
        return [forward, *downstream]
    return [backward]
