"""The search: every mesh, micro-batch and schedule, with as little recompute as fits, by time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ilm_compile.cost.constants import Software
from ilm_compile.cost.data_parallel import software_of
from ilm_compile.cost.hardware import GIB, HARDWARE, Hardware, hardware_named
from ilm_compile.cost.layer_time import PRECISIONS
from ilm_compile.cost.sizes import ModelSizes
from ilm_compile.errors import PlanError
from ilm_compile.planner.candidate import Candidate
from ilm_compile.planner.explore import explored
from ilm_compile.planner.fitting import losers
from ilm_compile.planner.model_sizes import sizes_of
from ilm_compile.planner.space import Question, Rejected
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What a search found: the plans that fit, fastest first, and what was rejected, and why."""

    question: Question
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]

    @property
    def best(self) -> Candidate:
        """The fastest. Raises `PlanError` if nothing fits, naming what comes nearest."""
        if not self.candidates:
            asked = self.question
            nearest = min(
                (r for r in self.rejected if r.reason.startswith("needs")),
                key=lambda r: float(r.reason.split()[1]),
                default=None,
            )
            raise PlanError(
                f"search: no plan on {asked.gpus} x {asked.hardware.name} fits "
                f"{asked.limit / GIB:.1f} of {asked.memory_bytes / GIB:.1f} GiB"
                + (f"; nearest is {nearest.what}: {nearest.reason}" if nearest else "")
                + "; use more devices, a shorter sequence or more memory"
            )
        return self.candidates[0]

    @property
    def plan(self) -> Plan:
        """The fastest as `partition` and `parallelize` take it."""
        return self.plan_of(self.best)

    def plan_of(self, candidate: Candidate) -> Plan:
        """Return a candidate as `partition` and `parallelize` take it."""
        plan, machine = candidate.to_plan(), self.question.hardware
        if not machine.cores:
            plan = plan.replace(kernels="triton")
        name = machine.path or machine.name
        return plan.replace(hardware=name) if machine.path or name in HARDWARE else plan

    def why_not(self) -> list[Rejected]:
        """Return a line for each other schedule and recompute of the best plan, and each mesh."""
        best, seen = self.best, set()
        lines = [*losers(self.question, best)]
        for candidate in self.candidates:
            plan = candidate.plan
            mesh = (plan.tp, plan.cp, plan.ep, plan.pp)
            if mesh not in seen and candidate is not best:
                lines.append(Rejected(candidate.name, candidate.slower_than(best)))
            seen.add(mesh)
        return [*lines, *self.rejected]


def search(
    model: ModelSizes | Program,
    gpus: int,
    hardware: Hardware | str,
    *,
    tokens_per_batch: int,
    seq: int,
    memory: float | None = None,
    precision: str = "bf16",
    software: Software | None = None,
    wanted: Mapping[str, Any] | None = None,
) -> Search:
    """Return the plans for a step of `tokens_per_batch` on `gpus` devices, fastest first.

    Every schedule, and all that can be recomputed, is a candidate wherever it can run and may be
    the fastest: see `explored`.

    model: its sizes, or what `trace` made of it. hardware: itself, a name of `HARDWARE` or the path
    of a TOML file. memory: bytes of a device that a program may fill, of which a share is left
    free, `Software.kept_free`; None: what the hardware leaves to a program. software: whose
    constants; None: this package's. wanted: what is decided already, fields of `Plan`, and "rows"
    of a micro-batch. The same arguments give the same result, in the same order. Raises `PlanError`
    for a batch of no whole number of sequences, a precision or hardware that is unknown, a program
    whose sizes cannot be read.
    """
    sizes = sizes_of(model) if isinstance(model, Program) else model
    if isinstance(hardware, str):
        hardware = hardware_named(hardware)
    if tokens_per_batch < seq or tokens_per_batch % seq:
        raise PlanError(
            f"search: tokens_per_batch={tokens_per_batch} is not a multiple of seq={seq}; use "
            f"{max(1, round(tokens_per_batch / seq)) * seq}"
        )
    if precision not in PRECISIONS:
        raise PlanError(f"search: precision={precision!r}; known are {', '.join(PRECISIONS)}")
    question = Question(
        sizes=sizes,
        gpus=gpus,
        hardware=hardware,
        sequences=tokens_per_batch // seq,
        seq=seq,
        memory_bytes=hardware.usable_bytes if memory is None else memory,
        software=software or software_of(hardware),
        precision=precision,
        wanted=wanted or {},
    )
    rejected: list[Rejected] = []
    candidates = explored(question, rejected)
    candidates.sort(key=lambda one: (one.time.total, one.name))
    return Search(question=question, candidates=tuple(candidates), rejected=tuple(rejected))
