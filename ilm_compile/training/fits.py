"""Whether a plan fits the memory of its devices, before anything is built, and which one would.

Refused is what cannot run, and nothing else: weights, gradients and optimizer state are exact, of
the activations that are predicted half count, and of its device a rank may fill all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from ilm_compile.automatic import PRECISIONS, hardware_of
from ilm_compile.config import Config
from ilm_compile.cost import HARDWARE, Hardware
from ilm_compile.cost.constants import OURS, software_named
from ilm_compile.cost.data_parallel import software_of
from ilm_compile.cost.hardware import GIB
from ilm_compile.cost.memory import static_bytes_per_parameter
from ilm_compile.cost.pipeline_time import FORMS
from ilm_compile.cost.sizes import ModelSizes, StepPlan
from ilm_compile.cost.step_memory import step_memory
from ilm_compile.errors import PlanError
from ilm_compile.planner import Candidate, Question, search
from ilm_compile.planner.calibrate import memory_bytes
from ilm_compile.planner.fitting import candidate_of, fit_of
from ilm_compile.program.plan import AUTO, SELECTIVE, Plan
from ilm_compile.training.launch import Place

ACTIVATIONS = 0.5  # of those predicted, the part that any program surely keeps
MOST_RANKS = 1024  # that are tried where this world is too small
# A key of the config, and the field of a plan that says what it should be.
KEYS: Mapping[str, str] = {
    "parallel.tensor": "tp",
    "parallel.context": "cp",
    "parallel.expert": "ep",
    "parallel.pipeline": "pp",
    "parallel.num_chunks": "num_chunks",
    "parallel.schedule": "schedule",
    "parallel.zero": "zero",
    "parallel.checkpoint": "checkpoint",
    "parallel.memory": "memory",
    "data.micro_num": "num_microbatches",
}


def too_large(
    config: Config,
    plan: Plan,
    model: nn.Module,
    sizes: ModelSizes | None,
    *,
    world_size: int,
    available: float,
) -> Iterator[str]:
    """Yield why the plan of a config cannot fit `available` bytes a rank, and what would; or none.

    sizes: of the model, from which activations are predicted.
    """
    dp = max(1, world_size // plan.ranks_per_replica)
    held = sum(_held_bytes(p, plan, dp) for p in model.parameters()) / (plan.tp * plan.pp)
    kept = 0.0
    if sizes and not plan.compile and plan.schedule in FORMS:
        step = _step_plan(config, plan, dp)
        kept = ACTIVATIONS * step_memory(sizes, step, software_named(OURS)).activations
    if held + kept <= available:
        return
    with_kept = f", {(held + kept) / GIB:.1f} with half of the activations" if kept else ""
    yield (
        f"memory: weights, gradients and optimizer state need about {held / GIB:.1f} GiB on each "
        f"rank{with_kept}; {available / GIB:.1f} GiB are there; "
        f"{_advice(config, plan, sizes, world_size, available)}; if this is wrong, "
        "parallel.check_memory=false starts it all the same"
    )


def available_bytes(place: Place) -> float:
    """Memory of this rank's device: all of its GPU's, or its share of the machine's."""
    if torch.cuda.is_available() and place.local_rank < torch.cuda.device_count():
        return float(memory_bytes(torch.device("cuda", place.local_rank)))
    return memory_bytes(torch.device("cpu")) / place.local_world_size


def _held_bytes(parameter: nn.Parameter, plan: Plan, dp: int) -> float:
    """What one of the ranks that divide the tokens holds of a parameter.

    One of three dimensions may be the matrices of experts, of which it then has a part.
    """
    is_expert = parameter.ndim == 3 and parameter.shape[0] % plan.ep == 0
    parts = plan.ep if is_expert else 1
    sharing = dp * plan.cp * plan.ep // parts
    each = static_bytes_per_parameter(parameter.dtype, dp=sharing, zero=plan.zero)
    return prod(parameter.shape) // parts * each


def _step_plan(config: Config, plan: Plan, dp: int) -> StepPlan:
    """The plan of the config; of checkpoint="auto" the one that keeps least."""
    share = float(plan.checkpoint) if not isinstance(plan.checkpoint, str) else 1.0
    recompute = SELECTIVE if plan.checkpoint == SELECTIVE else "full" if share else "none"
    return StepPlan(
        seq=config.data.seq_len,
        micro_batch=config.data.micro_bsz / plan.ep,
        num_microbatches=plan.num_microbatches,
        tp=plan.tp,
        cp=plan.cp,
        ep=plan.ep,
        pp=plan.pp,
        dp=dp * plan.ep,
        chunks=plan.num_chunks,
        schedule=plan.schedule,
        recompute=recompute,
        recompute_share=share or 1.0,
        zero=plan.zero,
        sequence_parallel=plan.tp > 1 and plan.sequence_parallel is not False,
        precision=PRECISIONS[plan.dtype],
    )


def expected(
    config: Config, plan: Plan, sizes: ModelSizes | None, *, world_size: int, available: float
) -> str:
    """Return what a step is predicted to take, in one line; empty for a model that nobody knows.

    As `ilm-compile plan` predicts it, for the device that is found.
    """
    hardware = _hardware()
    if sizes is None or plan.schedule not in FORMS:
        return ""
    step = _step_plan(config, plan, max(1, world_size // plan.ranks_per_replica))
    question = Question(
        sizes=sizes,
        gpus=step.gpus,
        hardware=hardware,
        sequences=round(step.micro_batch * step.num_microbatches * step.dp),
        seq=step.seq,
        memory_bytes=available,
        software=software_of(hardware),
        precision=step.precision,
    )
    found = candidate_of(question, fit_of(question, step, is_own=plan.checkpoint == AUTO))
    return f"expected on {step.gpus} x {hardware.name}: {found.figures}"


def _advice(
    config: Config, plan: Plan, sizes: ModelSizes | None, world_size: int, available: float
) -> str:
    """The keys of the plan that fits and changes least of this one; more ranks if none does."""
    if sizes is None:
        return (
            "raise parallel.tensor or parallel.pipeline, take parallel.zero=3, or start more "
            "processes"
        )
    data, dp = config.data, max(1, world_size // plan.ranks_per_replica)
    ranks = world_size
    while ranks <= MOST_RANKS:
        found = search(
            sizes,
            ranks,
            _hardware(),
            tokens_per_batch=data.micro_bsz * data.micro_num * dp * data.seq_len,
            seq=data.seq_len,
            memory=available,
        )
        if found.candidates:
            best = min(found.candidates, key=lambda one: (len(changed_keys(config, one)), _s(one)))
            keys = " ".join(f"--set {key}={value}" for key, value in changed_keys(config, best))
            start = f"start {ranks} processes with" if ranks > world_size else "take"
            return (
                f"{start} {keys or 'the same plan'}, predicted to need "
                f"{best.memory.total / GIB:.1f} GiB"
            )
        ranks *= 2
    return f"no plan of {MOST_RANKS} ranks fits: use devices with more memory, or a shorter row"


def _s(candidate: Candidate) -> float:
    return candidate.time.total


def _hardware() -> Hardware:
    try:
        name = hardware_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except PlanError:  # a GPU that no row is of: memory is what counts
        name = Plan().hardware
    return HARDWARE[name]


def changed_keys(config: Config, candidate: Candidate) -> list[tuple[str, Any]]:
    """Return the keys to change of a config for a candidate, and their values in TOML."""
    plan, wanted = config.plan(), candidate.to_plan()
    rows = int(candidate.plan.micro_batch * candidate.plan.ep)
    changes = [
        (key, getattr(wanted, field))
        for key, field in KEYS.items()
        if getattr(wanted, field) != getattr(plan, field)
    ]
    if rows != config.data.micro_bsz:
        changes.append(("data.micro_bsz", rows))
    return [(key, str(value).lower()) for key, value in changes]
