"""The schedules by name. Stage s lives on rank s % pp, or where its placement says; a rank holds
`num_chunks` stages. Those that split the backward are in `split` and `vee`, beside this module.

All three here run the forwards and the backwards of a rank in one fixed order and differ only in
how many forwards a rank runs before its first backward: all of them (gpipe), or just enough to keep
the ranks behind it busy (1f1b, interleaved_1f1b).
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Protocol, TypeVar

from ilm_compile.errors import ScheduleError
from ilm_compile.program.plan import Plan
from ilm_compile.schedule.actions import Action, Kind
from ilm_compile.schedule.comms import insert_comms
from ilm_compile.schedule.schedule import Schedule

Placement = Callable[[int, int], int]


class Builder(Protocol):
    """Returns the compute actions of every rank, a function of its arguments alone."""

    def __call__(
        self, *, pp: int, num_microbatches: int, num_chunks: int
    ) -> Iterable[Sequence[Action]]: ...


BuilderT = TypeVar("BuilderT", bound=Builder)
_BUILDERS: dict[str, Builder] = {}
_PLACEMENTS: dict[str, Placement] = {}


def looped(stage: int, pp: int) -> int:
    """The rank of a stage, if the stages go round the ranks."""
    return stage % pp


def register_schedule(
    name: str, *, placement: Placement = looped
) -> Callable[[BuilderT], BuilderT]:
    """Make the decorated builder available as `build(name, ...)`, and in a `Plan`.

    placement: the rank of a stage, given that and pp.
    """
    if name in _BUILDERS:
        raise ScheduleError(f"schedule {name!r} is already registered; choose another name")

    def register(builder: BuilderT) -> BuilderT:
        _BUILDERS[name] = builder
        _PLACEMENTS[name] = placement
        return builder

    return register


def build(name: str, *, pp: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """The named schedule with its sends and receives; `check` proves that it can run.

    A name that ends in ".csv" is a file in either format of `Schedule.to_csv`.
    """
    sizes = {"pp": pp, "num_microbatches": num_microbatches, "num_chunks": num_chunks}
    for option, size in sizes.items():
        if size < 1:
            raise ScheduleError(f"schedule {name!r}: {option} must be at least 1, got {size}")
    if not name.endswith(".csv"):
        _check_known(name)
        return insert_comms(Schedule.from_rows(name, _BUILDERS[name](**sizes)))
    read = _read(name)
    found = read.num_ranks, read.num_microbatches, read.num_stages
    if found != (pp, num_microbatches, pp * num_chunks):
        raise ScheduleError(
            f"schedule {name!r} has {found[0]} ranks, {found[1]} micro-batches and {found[2]} "
            f"stages, but the plan has pp={pp}, num_microbatches={num_microbatches} and "
            f"pp * num_chunks = {pp * num_chunks} stages; change either"
        )
    has_messages = any(not action.is_compute for row in read.actions for action in row)
    return read if has_messages else insert_comms(read)


def schedule_of(plan: Plan) -> Schedule:
    """The schedule that `plan` names. Raises `ScheduleError` for counts that do not fit it."""
    return build(
        plan.schedule,
        pp=plan.pp,
        num_microbatches=plan.num_microbatches,
        num_chunks=plan.num_chunks,
    )


def stage_ranks(name: str, *, pp: int, num_stages: int) -> tuple[int, ...]:
    """The rank on which the named schedule runs each stage."""
    if name.endswith(".csv"):
        return _read(name).stage_to_rank
    _check_known(name)
    return tuple(_PLACEMENTS[name](stage, pp) for stage in range(num_stages))


def known_schedules() -> list[str]:
    """The names that `build` and a `Plan` take."""
    return sorted(_BUILDERS)


def _read(path: str) -> Schedule:
    try:
        return Schedule.from_csv(path, name=path)
    except (OSError, UnicodeError, csv.Error) as error:
        raise ScheduleError(f"schedule {path!r} cannot be read: {error}") from error


def _check_known(name: str) -> None:
    if name not in _BUILDERS:
        raise ScheduleError(
            f"unknown schedule {name!r}; known: {', '.join(known_schedules())}, or a file that "
            "ends in .csv"
        )


@register_schedule("gpipe")
def _gpipe(*, pp: int, num_microbatches: int, num_chunks: int) -> Iterable[Sequence[Action]]:
    """All forwards, then all backwards (Huang et al., 2018, arXiv 1811.06965).

    Several chunks follow each other breadth first (Lamy-Poirier, 2022, arXiv 2211.05953).
    """
    for rank in range(pp):
        forwards, backwards = compute_order(rank, pp, num_microbatches, num_chunks)
        yield [*forwards, *backwards]


@register_schedule("1f1b")
def _1f1b(*, pp: int, num_microbatches: int, num_chunks: int) -> Iterable[Sequence[Action]]:
    """One forward, one backward in turn (Narayanan et al., 2021, arXiv 2104.04473, section 2.2)."""
    if num_chunks > 1:
        raise ScheduleError(
            f"schedule '1f1b' runs one chunk per rank, got num_chunks={num_chunks}; "
            "use schedule='interleaved_1f1b'"
        )
    for rank in range(pp):
        order = compute_order(rank, pp, num_microbatches, num_chunks)
        yield one_forward_one_backward(*order, num_warmup=pp - 1 - rank)


@register_schedule("interleaved_1f1b")
def _interleaved(*, pp: int, num_microbatches: int, num_chunks: int) -> Iterable[Sequence[Action]]:
    """1F1B over several chunks per rank (Narayanan et al., 2021, arXiv 2104.04473, section 2.2).

    The paper wants a multiple of pp micro-batches, in rounds of pp. As in torch's
    ScheduleInterleaved1F1B a round may be longer, as long as all rounds are equal.
    """
    if num_chunks < 2:
        raise ScheduleError(
            f"schedule 'interleaved_1f1b' needs at least 2 chunks per rank, got num_chunks="
            f"{num_chunks}; use schedule='1f1b'"
        )

    round_size = _round_size(pp, num_microbatches)
    for rank in range(pp):
        order = compute_order(rank, pp, num_microbatches, num_chunks, round_size)
        num_warmup = (num_chunks - 1) * round_size + 2 * (pp - 1 - rank)
        yield one_forward_one_backward(*order, num_warmup=num_warmup)


def _round_size(pp: int, num_microbatches: int) -> int:
    """The number of micro-batches in a round: at least pp where there are as many, all equal."""

    def fits(count: int) -> bool:
        return count % max(1, count // pp) == 0

    if not fits(num_microbatches):
        smaller = next(filter(fits, range(num_microbatches, 0, -1)))
        larger = next(filter(fits, range(num_microbatches, num_microbatches + pp)))
        raise ScheduleError(
            f"schedule 'interleaved_1f1b': num_microbatches={num_microbatches} does not split into "
            f"{num_microbatches // pp} equal rounds of at least pp={pp}; use {smaller}, {larger} "
            f"or any multiple of {pp}"
        )
    return num_microbatches // max(1, num_microbatches // pp)


def compute_order(
    rank: int, pp: int, num_microbatches: int, num_chunks: int, round_size: int | None = None
) -> tuple[list[Action], list[Action]]:
    """The forwards and the backwards of a rank, each in rounds of micro-batches.

    In a round one chunk after the other runs all micro-batches. None: everything is one round.
    """
    size = round_size or num_microbatches
    order = sorted(
        product(range(num_chunks), range(num_microbatches)),
        key=lambda pair: (pair[1] // size, pair),
    )
    last = num_chunks - 1
    forwards = [Action(chunk * pp + rank, Kind.F, microbatch) for chunk, microbatch in order]
    backwards = [
        Action((last - chunk) * pp + rank, Kind.B, microbatch) for chunk, microbatch in order
    ]
    return forwards, backwards


def one_forward_one_backward(
    forwards: list[Action], backwards: list[Action], *, num_warmup: int
) -> list[Action]:
    """Some forwards, then a forward and a backward in turn, then the backwards that are left."""
    num_warmup = min(num_warmup, len(forwards))
    pairs = zip(forwards[num_warmup:], backwards, strict=False)
    steady = [action for pair in pairs for action in pair]
    return [*forwards[:num_warmup], *steady, *backwards[len(forwards) - num_warmup :]]
