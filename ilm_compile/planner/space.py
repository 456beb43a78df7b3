"""The plans that a search considers, and those that cannot be, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

from ilm_compile.cost.constants import Software
from ilm_compile.cost.hardware import Hardware
from ilm_compile.cost.sizes import ModelSizes, StepPlan
from ilm_compile.errors import PlanError

# From the fastest that takes most memory: the name, and the share of the layers.
RECOMPUTE = (("none", 1.0), ("full", 0.25), ("full", 0.5), ("full", 0.75), ("full", 1.0))
ZERO = (1, 3)
MAX_MICRO_BATCH = 64
MIN_TOKENS = 1024  # that a context-parallel rank should have of a sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked: a model of these sizes, on so many devices, in steps of so many sequences.

    memory_bytes: what a rank may fill.
    """

    sizes: ModelSizes
    gpus: int
    hardware: Hardware
    sequences: int
    seq: int
    memory_bytes: float
    software: Software = field(repr=False)
    precision: str = "bf16"

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
    """The chunks that a schedule can have, and with how many micro-batches it is worth running."""

    chunks: tuple[int, ...]
    runs: Callable[[int, int], bool]


# Beside 1F1B, where there are several stages. zb_h2 and dualpipe_v keep more than zb_v, and are no
# faster; v_half and v_min lose with every micro-batch as soon as forward, backward and weights do
# not take the same time, which no closed form says.
SCHEDULES: dict[str, Rule] = {
    "interleaved_1f1b": Rule((2, 4, 8), lambda pp, count: count % pp == 0),
    "zb_h1": Rule((1,), lambda pp, count: count >= pp),
    "zb_v": Rule((2,), lambda pp, count: count >= 2 * pp - 1),
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
    """Yield the plans on a mesh, without recompute: see `ladder`."""
    tp, cp, ep, pp, dp = shape
    rows = question.sequences // dp
    for micro_batch in _powers(min(rows, MAX_MICRO_BATCH)):
        if rows % micro_batch:
            continue
        num_microbatches = rows // micro_batch
        for zero in ZERO if dp * cp > 1 else ZERO[:1]:
            start = StepPlan(
                seq=question.seq,
                micro_batch=micro_batch,
                num_microbatches=num_microbatches,
                tp=tp,
                cp=cp,
                ep=ep,
                pp=pp,
                dp=dp,
                zero=zero,
                sequence_parallel=tp > 1 and question.seq % (tp * cp) == 0,
                precision=question.precision,
            )
            yield start
            for schedule, rule in SCHEDULES.items() if pp > 1 else ():
                for chunks in rule.chunks:
                    divides = chunks == 1 or question.sizes.layers % (pp * chunks) == 0
                    if divides and rule.runs(pp, num_microbatches):
                        yield replace(start, schedule=schedule, chunks=chunks)


def ladder(plan: StepPlan) -> Iterator[StepPlan]:
    """Yield the plan with more and more recompute: each is slower and smaller than the last."""
    for recompute, share in RECOMPUTE:
        yield replace(plan, recompute=recompute, recompute_share=share)


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
