"""All that can be the fastest plan, and no more: a second for any number of devices.

What a step is made of is asked once for all schedules and recomputes of a plan. The fewest seconds
that it takes, if its slowest rank never waits, decide what is tried: plans go in that order, and
one that cannot be the fastest any more is tried under the first schedule that fits alone, for it to
have its line. Schedules whose time no formula says are walked last, if they still may be.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from ilm_compile.cost.hardware import GIB
from ilm_compile.cost.pipeline_time import LISTED
from ilm_compile.cost.sizes import StepPlan
from ilm_compile.cost.step_time import StepCosts
from ilm_compile.planner.candidate import Candidate
from ilm_compile.planner.fitting import (
    Fit,
    at_least,
    candidate_of,
    costs_of,
    fitting_recompute,
    walked,
)
from ilm_compile.planner.space import Question, Rejected, Shape, plans, scheduled, shapes


class _Base(NamedTuple):
    """A plan on a mesh without a schedule; seconds: that it takes under any."""

    shape: Shape
    plan: StepPlan
    costs: StepCosts
    seconds: float


class _Mesh:
    """What became of the plans on a mesh. least: bytes, and the plan that needs them."""

    def __init__(self) -> None:
        self.has_candidate = False
        self.listed: list[Fit] = []
        self.least: tuple[float, StepPlan] | None = None


def explored(question: Question, rejected: list[Rejected]) -> list[Candidate]:
    """Return the plans that fit and may be the fastest; append why a mesh has none."""
    bases = []
    for shape in shapes(question, rejected):
        for plan in plans(question, shape):
            costs = costs_of(question, plan)
            bases.append(_Base(shape, plan, costs, at_least(plan, costs)))
    meshes = {base.shape: _Mesh() for base in bases}
    found: list[Candidate] = []
    best = inf
    for base in sorted(bases, key=lambda base: base.seconds):
        mesh, is_promising = meshes[base.shape], base.seconds < best
        for plan in scheduled(question, base.plan):
            fits, needed = fitting_recompute(question, plan, base.costs, own=is_promising)
            if mesh.least is None or needed < mesh.least[0]:
                mesh.least = needed, plan
            if plan.schedule in LISTED:
                mesh.listed += fits
                continue
            made = [candidate_of(question, fit) for fit in fits]
            best = min([best, *(one.time.total for one in made)])
            found += made
            mesh.has_candidate |= bool(made)
            if made and not is_promising:
                break
    for mesh in meshes.values():
        faster = [fit for fit in mesh.listed if at_least(fit.plan, fit.costs) < best]
        found += walked(question, faster)
        mesh.has_candidate |= bool(faster)
    rejected[:0] = [
        _line(question, shape, mesh) for shape, mesh in meshes.items() if not mesh.has_candidate
    ]
    return found


def _line(question: Question, shape: Shape, mesh: _Mesh) -> Rejected:
    """Why a mesh has no candidate."""
    tp, cp, ep, pp, dp = shape
    what = f"tp={tp} cp={cp} ep={ep} pp={pp} dp={dp // ep}"
    if mesh.listed:
        seconds, name = min((at_least(f.plan, f.costs), f.plan.schedule) for f in mesh.listed)
        return Rejected(what, f"fits with {name} alone, which computes for {seconds:.3g} s")
    assert mesh.least is not None
    needed, plan = mesh.least
    return Rejected(
        what,
        f"needs {needed / GIB:.1f} GiB of {question.limit / GIB:.1f} GiB with {plan.schedule} "
        f"zero={plan.zero} micro-batch={plan.micro_batch:g}, recompute of all layers",
    )
