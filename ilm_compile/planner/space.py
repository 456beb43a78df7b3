"""The plans that a search considers, and those that cannot be, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

from ilm_compile.cost.constants import Software
from ilm_compile.cost.hardware import Hardware
from ilm_compile.cost.sizes import ModelSizes, StepPlan
from ilm_compile.errors import PlanError

# What all ranks may recompute alike: the name, and the share of the layers.
RECOMPUTE = (
    *(("none", 1.0), ("selective", 1.0)),
    *(("full", 0.25), ("full", 0.5), ("full", 0.75), ("full", 1.0)),
)
ZERO = (1, 3)
MAX_MICRO_BATCH = 64
MIN_TOKENS = 1024  # that a context-parallel rank should have of a sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked: a model of these sizes, on so many devices, in steps of so many sequences.

    memory_bytes: of a device, what a program may fill; of that a search leaves some free. wanted:
    what is decided already, see `search`.
    """

    sizes: ModelSizes
    gpus: int
    hardware: Hardware
    sequences: int
    seq: int
    memory_bytes: float
    software: Software = field(repr=False)
    precision: str = "bf16"
    wanted: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def limit(self) -> float:
        """The bytes that a plan may be predicted to need."""
        return self.memory_bytes * (1 - self.software.kept_free)

    def __post_init__(self) -> None:
        for name in ("gpus", "sequences", "seq"):
            if getattr(self, name) < 1:
                raise PlanError(f"search: {name}={getattr(self, name)}; expected at least 1")


class Rejected(NamedTuple):
    """What cannot be, in the words of an option ("tp=16 pp=2"), and why."""

    what: str
    reason: str


class Shape(NamedTuple):
    """The ranks on each axis; those of ep work on other rows, as those of dp do."""

    tp: int
    cp: int
    ep: int
    pp: int
    dp: int


class Rule(NamedTuple):
    """The chunks that a schedule can have, and the micro-batches with which it can run."""

    chunks: tuple[int, ...] = (1,)
    runs: Callable[[int, int], bool] = lambda pp, count: True
    needs: str = ""


# Where there are several stages. dualpipe_v starts 2 pp micro-batches before it begins to drain.
SCHEDULES: dict[str, Rule] = {
    "1f1b": Rule(),
    "gpipe": Rule((1, 2, 4)),
    "interleaved_1f1b": Rule(
        (2, 4, 8), lambda pp, count: count % pp == 0, "a multiple of pp micro-batches"
    ),
    "zb_h1": Rule(),
    "zb_h2": Rule(),
    "zb_v": Rule((2,)),
    "v_half": Rule((2,)),
    "v_min": Rule((2,)),
    "dualpipe_v": Rule((2,), lambda pp, count: count >= 2 * pp, "2 pp micro-batches"),
}


def shapes(question: Question, rejected: list[Rejected]) -> Iterator[Shape]:
    """Yield the meshes that use all devices; append why others cannot be."""
    options = [
        _allowed(axis, _powers(limit), question, rejected)
        for axis, limit in (
            ("tp", question.gpus),
            ("cp", min(question.gpus, question.seq)),
            ("ep", min(question.gpus, question.sizes.experts)),
            ("pp", question.gpus),
        )
    ]
    for tp, cp, ep, pp in product(*options):
        rest, left = divmod(question.gpus, tp * cp * pp)
        what = f"tp={tp} cp={cp} ep={ep} pp={pp}"
        if rest == 0 or left:
            if rest:
                rejected.append(Rejected(what, f"does not divide {question.gpus} devices"))
            continue
        if rest % ep:
            rejected.append(Rejected(what, f"ep={ep} does not divide the {rest} ranks left"))
        elif question.sequences % rest:
            reason = f"{question.sequences} sequences do not divide among {rest} ranks"
            rejected.append(Rejected(f"{what} dp={rest}", reason))
        else:
            yield Shape(tp, cp, ep, pp, rest)


def plans(question: Question, shape: Shape) -> Iterator[StepPlan]:
    """Yield the plans on a mesh, without schedule and recompute: see `scheduled`."""
    tp, cp, ep, pp, dp = shape
    rows = question.sequences // dp
    for micro_batch in _powers(min(rows, MAX_MICRO_BATCH)):
        if rows % micro_batch:
            continue
        for zero in ZERO if dp * cp > 1 else ZERO[:1]:
            plan = StepPlan(
                seq=question.seq,
                micro_batch=micro_batch,
                num_microbatches=rows // micro_batch,
                tp=tp,
                cp=cp,
                ep=ep,
                pp=pp,
                dp=dp,
                zero=zero,
                sequence_parallel=tp > 1 and question.seq % (tp * cp) == 0,
                precision=question.precision,
            )
            if _is_wanted(question, plan):
                yield plan


def _is_wanted(question: Question, plan: StepPlan) -> bool:
    own = {"dp": plan.dp // plan.ep, "rows": plan.micro_batch * plan.ep}
    for name in ("tp", "cp", "ep", "pp", "zero", "num_microbatches"):
        own[name] = getattr(plan, name)
    return all(own[name] == value for name, value in question.wanted.items() if name in own)


def scheduled(question: Question, plan: StepPlan) -> Iterator[StepPlan]:
    """Yield a plan under every schedule with which it can run."""
    wanted = question.wanted
    for schedule in SCHEDULES if plan.pp > 1 else ("1f1b",):
        for chunks in SCHEDULES[schedule].chunks:
            one = replace(plan, schedule=schedule, chunks=chunks)
            is_wanted = wanted.get("schedule", schedule) == schedule
            is_wanted &= wanted.get("num_chunks", chunks) == chunks
            if is_wanted and not why_unscheduled(question, one):
                yield one


def why_unscheduled(question: Question, plan: StepPlan) -> str:
    """Return why a plan cannot run with its schedule and chunks; empty if it can."""
    rule = SCHEDULES[plan.schedule]
    layers, stages = question.sizes.layers, plan.pp * plan.chunks
    if plan.chunks > 1 and layers % stages:
        return f"{layers} layers do not divide among {stages} stages"
    if not rule.runs(plan.pp, int(plan.num_microbatches)):
        return f"needs {rule.needs}, of which there are {plan.num_microbatches:g}"
    return ""


def recomputed(plan: StepPlan) -> list[StepPlan]:
    """Return a plan with each thing that all its ranks may recompute alike."""
    return [
        replace(plan, recompute=recompute, recompute_share=share) for recompute, share in RECOMPUTE
    ]


def _powers(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length())]


# For each axis, what must hold of its size, and in words what does not where it does not.
_RULES: dict[str, Sequence[tuple[Callable[[Question, int], bool], str]]] = {
    "tp": (
        (lambda q, n: q.sizes.heads % n == 0, "does not divide the {q.sizes.heads} heads"),
        (
            lambda q, n: n <= q.hardware.gpus_per_node,
            "leaves the node of {q.hardware.gpus_per_node}: its collectives wait for the network",
        ),
    ),
    "cp": (
        (lambda q, n: q.seq % n == 0, "does not divide the {q.seq} tokens of a sequence"),
        (
            lambda q, n: n == 1 or q.seq // n >= MIN_TOKENS,
            f"leaves fewer than {MIN_TOKENS} tokens of a sequence to a rank",
        ),
    ),
    "ep": ((lambda q, n: q.sizes.experts % n == 0, "does not divide the experts"),),
    "pp": ((lambda q, n: n <= q.sizes.layers, "has more stages than {q.sizes.layers} layers"),),
}


def _allowed(
    axis: str, sizes: Sequence[int], question: Question, rejected: list[Rejected]
) -> list[int]:
    """The sizes of an axis that break no rule."""
    allowed = []
    for size in sizes:
        broken = [words for rule, words in _RULES[axis] if not rule(question, size)]
        if broken:
            rejected.append(Rejected(f"{axis}={size}", broken[0].format(q=question)))
        else:
            allowed.append(size)
    return allowed
