"""Schedules with a split backward: B for the gradient of the input, W later for the weights'."""

from collections.abc import Iterable, Sequence

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule.actions import Action, Kind
from ilm_compile.schedule.builders import (
    compute_order,
    one_forward_one_backward,
    register_schedule,
)


@register_schedule("zb_h1")
def _zb_h1(*, pp: int, num_microbatches: int, num_chunks: int) -> Iterable[Sequence[Action]]:
    """1F1B whose ranks keep weight parts for the end (Qi et al., 2023, arXiv 2401.10241, 2.1).

    Every rank holds as many activations as the first rank of 1F1B.
    """
    return _handcrafted("zb_h1", 1, pp, num_microbatches, num_chunks)


@register_schedule("zb_h2")
def _zb_h2(*, pp: int, num_microbatches: int, num_chunks: int) -> Iterable[Sequence[Action]]:
    """Twice the forwards of `zb_h1` before the first backward (arXiv 2401.10241, section 2.2).

    No rank idles between its first and its last action if F, B and W take the same time.
    """
    return _handcrafted("zb_h2", 2, pp, num_microbatches, num_chunks)


def _handcrafted(
    name: str, forwards_per_hop: int, pp: int, num_microbatches: int, num_chunks: int
) -> Iterable[Sequence[Action]]:
    """1F1B with some forwards in advance for each rank that follows, and W as late in return."""
    if num_chunks > 1:
        raise ScheduleError(
            f"schedule {name!r} runs one chunk per rank, got num_chunks={num_chunks}; use 1"
        )
    for rank in range(pp):
        order = compute_order(rank, pp, num_microbatches, num_chunks)
        row = one_forward_one_backward(*order, num_warmup=forwards_per_hop * (pp - 1 - rank))
        yield _with_weights(row, delay=forwards_per_hop * rank)


def _with_weights(row: Iterable[Action], *, delay: int) -> list[Action]:
    """The row with each weight part right after the backward that comes `delay` backwards later."""
    done: list[Action] = []
    owed: list[Action] = []
    for action in row:
        done.append(action)
        if action.kind is Kind.B:
            owed.append(Action(action.stage, Kind.W, action.microbatch))
            if len(owed) > delay:
                done.append(owed.pop(0))
    return [*done, *owed]
