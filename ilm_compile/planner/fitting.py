"""What a plan recomputes so that it fits, what it takes then, and why its siblings lose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ilm_compile.cost.hardware import GIB
from ilm_compile.cost.layer_time import PRECISIONS
from ilm_compile.cost.pipeline_lists import spans
from ilm_compile.cost.sizes import StepPlan
from ilm_compile.cost.step_memory import StepMemory, fullest, memory_ranks, step_memory
from ilm_compile.cost.step_time import StepCosts, StepTime, step_costs
from ilm_compile.planner.candidate import Candidate
from ilm_compile.planner.space import (
    SCHEDULES,
    Question,
    Rejected,
    recomputed,
    why_unscheduled,
)


class Fit(NamedTuple):
    """A plan that fits, what its step is made of, and its memory."""

    plan: StepPlan
    costs: StepCosts
    memory: StepMemory


def costs_of(question: Question, plan: StepPlan) -> StepCosts:
    """Return what the step of a plan is made of, under any schedule and recompute."""
    return step_costs(question.sizes, plan, question.hardware, question.software)


def fitting_recompute(
    question: Question, plan: StepPlan, costs: StepCosts, *, own: bool = True
) -> tuple[list[Fit], float]:
    """Return the plan with the fastest recompute that fits, and with each rank's own choice.

    The second only where it may be faster, and `own` is asked for; none if nothing fits. And the
    fewest bytes that it can need.
    """
    ranks = memory_ranks(question.sizes, plan, question.software)
    smallest = fullest(ranks, question.sizes, replace(plan, recompute="full")).total
    if smallest > question.limit:
        return [], smallest
    found: list[Fit] = []
    for one in sorted(recomputed(plan), key=lambda one: _again(one, costs)):
        memory = fullest(ranks, question.sizes, one)
        if memory.total <= question.limit:
            found.append(Fit(one, costs, memory))
            break
    if own and found[0].plan.recompute != "none":
        found += filter(None, [_own_choice(question, plan, costs)])
    return found, smallest


def _again(plan: StepPlan, costs: StepCosts) -> float:
    """Seconds of a layer, on average."""
    return plan.recompute_share * costs.again(plan.recompute)


def _own_choice(question: Question, plan: StepPlan, costs: StepCosts) -> Fit | None:
    """The plan whose ranks each recompute as little as makes them fit."""
    again = {kind: costs.again(kind) for kind in ("selective", "full")}
    plan = replace(plan, recompute="auto")
    ranks = memory_ranks(question.sizes, plan, question.software)
    mixes = []
    for rank in ranks:
        mix = rank.least_mix(question.limit, again)
        if mix is None:
            return None
        mixes.append(mix)
    memory = (rank.with_mix(mix) for rank, mix in zip(ranks, mixes, strict=True))
    most = max(memory, key=lambda each: each.total)
    return Fit(replace(plan, mixes=tuple(mixes)), costs, most)


def fit_of(question: Question, plan: StepPlan, *, is_own: bool) -> Fit:
    """Return a plan whether it fits or not; is_own: as its ranks choose, if it can fit so."""
    costs = costs_of(question, plan)
    found = _own_choice(question, plan, costs) if is_own else None
    return found or Fit(plan, costs, step_memory(question.sizes, plan, question.software))


def walked(question: Question, fits: Sequence[Fit]) -> list[Candidate]:
    """Return what plans take whose lists must be walked, all of the same lists at once."""
    groups: dict[tuple[str, int, float], list[Fit]] = defaultdict(list)
    for fit in fits:
        groups[fit.plan.schedule, fit.plan.pp, fit.plan.num_microbatches].append(fit)
    found = []
    for (schedule, _, _), alike in groups.items():
        pipelines = [fit.costs.pipeline(fit.plan) for fit in alike]
        without = [replace(pipeline, message=0.0) for pipeline in pipelines]
        seconds = spans(schedule, [*pipelines, *without])
        found += [
            candidate_of(question, fit, fit.costs.total(fit.plan, (both, alone)))
            for fit, both, alone in zip(alike, seconds, seconds[len(alike) :], strict=False)
        ]
    return found


def at_least(plan: StepPlan, costs: StepCosts) -> float:
    """Return the seconds that a plan takes under any schedule: its slowest rank never waits."""
    busy = costs.pipeline(plan).busy
    return costs.total(plan, (busy, busy)).total


def candidate_of(question: Question, fit: Fit, time: StepTime | None = None) -> Candidate:
    """Return a plan with what it is predicted to take."""
    time = time or fit.costs.total(fit.plan)
    tokens = question.sequences * question.seq
    peak = question.gpus * question.hardware.peak_flops[PRECISIONS[question.precision]]
    return Candidate(
        plan=fit.plan,
        limit=question.limit,
        time=time,
        memory=fit.memory,
        tokens_per_second_per_gpu=tokens / time.total / question.gpus,
        mfu=question.sizes.token_flops(question.seq) * tokens / time.total / peak,
    )


def losers(question: Question, best: Candidate) -> Iterator[Rejected]:
    """Yield the best plan under each other schedule and with each other recompute, and why not."""
    costs = costs_of(question, best.plan)
    base = replace(best.plan, recompute="none", recompute_share=1.0, mixes=())
    for schedule, rule in SCHEDULES.items() if base.pp > 1 else ():
        for chunks in rule.chunks:
            one = replace(base, schedule=schedule, chunks=chunks)
            if (schedule, chunks) == (best.plan.schedule, best.plan.chunks):
                continue
            what = "with " + schedule + (f" x{chunks}" if chunks > 1 else "")
            if reason := why_unscheduled(question, one):
                yield Rejected(what, reason)
                continue
            fits, least = fitting_recompute(question, one, costs)
            yield Rejected(what, _why(question, fits, least, best))
    for one in recomputed(base):
        if one != best.plan:
            memory = step_memory(question.sizes, one, question.software)
            fits = [Fit(one, costs, memory)] if memory.total <= question.limit else []
            what = candidate_of(question, Fit(one, costs, memory)).recompute
            yield Rejected(f"with recompute={what}", _why(question, fits, memory.total, best))
    own = _own_choice(question, base, costs)
    if own and best.plan.recompute != "auto":
        fastest = candidate_of(question, own)
        reason = fastest.slower_than(best) if fastest.time.again else "recomputes nothing"
        yield Rejected("with recompute=auto", reason)


def _why(question: Question, fits: Sequence[Fit], needed: float, best: Candidate) -> str:
    if not fits:
        return f"needs {needed / GIB:.1f} GiB of {question.limit / GIB:.1f} GiB"
    found = min((candidate_of(question, fit) for fit in fits), key=lambda one: one.time.total)
    return found.slower_than(best)
