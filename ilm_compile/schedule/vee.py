"""Schedules of two stages per rank that lie on the ranks like a V: rank r has r and 2 pp - 1 - r.

`zb_v` and `dualpipe_v` are written out phase by phase; `v_half` and `v_min` repeat one pattern.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import product

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule.actions import Action, Kind, producers
from ilm_compile.schedule.builders import register_schedule

Rows = Iterable[Sequence[Action]]


def down_and_up(stage: int, pp: int) -> int:
    """The rank of a stage, if the stages go down the ranks and up again: stage 2 pp - 1 on 0."""
    way = stage % (2 * pp)
    return min(way, 2 * pp - 1 - way)


@register_schedule("zb_v", placement=down_and_up)
def _zb_v(*, pp: int, num_microbatches: int, num_chunks: int) -> Rows:
    """Without a bubble in the memory of 1F1B's first rank (arXiv 2401.10241, section 6).

    No rank idles between its first and its last action if F, B and W take the same time and there
    are 2 pp - 1 micro-batches.
    """
    _check_chunks("zb_v", num_chunks)
    num_steady = max(num_microbatches - pp, pp - 1)
    for rank in range(pp):
        hops = pp - rank
        phases = [
            *["F down"] * (2 * hops - 1),
            *["F up", "F down"] * rank,
            *["F up", "B up", "W up"] * hops,
            *["F down", "B down", "W down", "F up", "B up", "W up"] * num_steady,
            *["B down", "B up"] * rank,
            *["B down", "W down"] * hops,
            *["W up"] * rank,
            *["W down"] * rank,
        ]
        yield _counted(phases, rank, pp, num_microbatches)


@register_schedule("dualpipe_v", placement=down_and_up)
def _dualpipe_v(*, pp: int, num_microbatches: int, num_chunks: int) -> Rows:
    """A forward beside a backward of the other stage (DeepSeek's DualPipe, arXiv 2412.19437).

    The order is that of torch's ScheduleDualPipeV, which runs such a pair one after the other too
    unless told how to overlap it, and which leaves weight parts for later at the ends alone.
    """
    _check_chunks("dualpipe_v", num_chunks)
    num_steady = max(num_microbatches - 2 * pp, 0)
    for rank in range(pp):
        hops = pp - 1 - rank
        whole, split = ["up", "down"] * (rank + 1), ["down"] * hops
        whole, split = whole[: rank + 1], whole[rank + 1 :] + split
        phases = [
            *["F down"] * (2 * hops),
            *["F down", "F up"] * (rank + 1),
            *["B up", "W up", "F up"] * hops,
            *["F down", "B up", "W up", "F up", "B down", "W down"] * (num_steady + rank + 1),
            *["B up", "W up", "F up", "B down", "W down"] * hops,
            *(f"{kind} {way}" for way in whole for kind in "BW"),
            *(f"B {way}" for way in split[: rank + 1]),
            *(text for way in split[:hops] for text in (f"W {way}", "B down")),
            *(f"W {way}" for way in split[hops:]),
        ]
        yield _counted(phases, rank, pp, num_microbatches)


def _counted(phases: Iterable[str], rank: int, pp: int, num_microbatches: int) -> list[Action]:
    """The actions that `phases` spell ("B up"), each on the next micro-batch that there is."""
    stages = {"down": rank, "up": 2 * pp - 1 - rank}
    count: Counter[str] = Counter()
    row = []
    for text in phases:
        kind, way = text.split()
        row.append(Action(stages[way], Kind(kind), count[text]))
        count[text] += 1
    return [action for action in row if action.microbatch < num_microbatches]


# How many steps lie between a stage and the next one: forwards down and up, backwards down and up.
_Hops = tuple[int, int, int, int]
_PERIOD = 6  # steps for F, B and W of two stages


@register_schedule("v_half", placement=down_and_up)
def _v_half(*, pp: int, num_microbatches: int, num_chunks: int) -> Rows:
    """Half the bubble of 1F1B in half its memory (Qi et al., 2024, arXiv 2405.15362)."""
    _check_chunks("v_half", num_chunks)
    return _repeated(pp, num_microbatches, (2, 1, 2, 1), limit=(pp + 2) // 2 * 2)


@register_schedule("v_min", placement=down_and_up)
def _v_min(*, pp: int, num_microbatches: int, num_chunks: int) -> Rows:
    """Two thirds of the bubble of 1F1B in a third of its memory (arXiv 2405.15362)."""
    _check_chunks("v_min", num_chunks)
    return _repeated(pp, num_microbatches, (1, 1, 1, 1), limit=(pp + 4) // 3 * 2)


def _check_chunks(name: str, num_chunks: int) -> None:
    if num_chunks != 2:
        raise ScheduleError(
            f"schedule {name!r} runs two chunks per rank, got num_chunks={num_chunks}; use 2"
        )


def _repeated(pp: int, num_microbatches: int, hops: _Hops, *, limit: int) -> Rows:
    """One micro-batch after the other in the same pattern, and weight parts where a rank waits.

    limit: how many micro-batches of its stages a rank holds at once, for which a forward waits.
    """
    kinds = (Kind.F, Kind.F, Kind.B, Kind.B)
    orders = []
    for rank, steps in enumerate(_pattern(pp, hops)):
        stages = (rank, 2 * pp - 1 - rank, 2 * pp - 1 - rank, rank)
        block = list(zip(steps, stages, kinds, strict=True))
        timed = [
            (step + _PERIOD * m, Action(stage, kind, m))
            for m in range(num_microbatches)
            for step, stage, kind in block
        ]
        orders.append(deque(action for _, action in sorted(timed, key=lambda each: each[0])))
    return _filled(orders, limit)


@cache
def _pattern(pp: int, hops: _Hops) -> list[list[int]]:
    """For each rank, when a micro-batch's F down, F up, B up and B down begin, as early as can be.

    A micro-batch follows every `_PERIOD` steps, so no two steps of a rank may be equal modulo that.
    Then the lists of all ranks are full for any number of them. Only the waits where a micro-batch
    turns are free: a hop costs the same on every rank.
    """
    down, up, back, home = hops
    last = pp - 1
    for waits in sorted(product(range(_PERIOD), repeat=3), key=sum):
        forward_up = down * last + 1 + waits[0]
        backward_up = forward_up + up * last + 1 + waits[1]
        backward_down = backward_up + back * last + 1 + waits[2]
        steps = [
            [
                down * rank,
                forward_up + up * (last - rank),
                backward_up + back * rank,
                backward_down + home * (last - rank),
            ]
            for rank in range(pp)
        ]
        if all(len({step % _PERIOD for step in row}) == len(row) for row in steps):
            return steps
    raise AssertionError(f"hops {hops} always meet")


def _filled(orders: Sequence[deque[Action]], limit: int) -> Iterator[list[Action]]:
    """Yield the rows that begin each action as soon as they can, all of which take one step."""
    rows: list[list[Action]] = [[] for _ in orders]
    owed: list[deque[Action]] = [deque() for _ in orders]
    alive = [0] * len(orders)
    done: set[Action] = set()
    while any(orders) or any(owed):
        begun = []
        for rank, order in enumerate(orders):
            is_free = order and (order[0].kind is Kind.B or alive[rank] < limit)
            if is_free and done.issuperset(producers(order[0], 2 * len(orders))):
                begun.append((rank, order.popleft()))
            elif owed[rank]:
                begun.append((rank, owed[rank].popleft()))
        assert begun, f"limit {limit} is below what the orders hold"
        for rank, action in begun:
            rows[rank].append(action)
            done.add(action)
            alive[rank] += {Kind.F: 1, Kind.W: -1}.get(action.kind, 0)
            if action.kind is Kind.B:
                owed[rank].append(Action(action.stage, Kind.W, action.microbatch))
    yield from rows
