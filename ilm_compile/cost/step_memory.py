"""The memory of one training step of a plan, on the rank that needs most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from ilm_compile.cost.constants import Software
from ilm_compile.cost.layer_time import layer_parameters
from ilm_compile.cost.pipeline import Pipeline
from ilm_compile.cost.pipeline_lists import InFlight
from ilm_compile.cost.pipeline_time import form
from ilm_compile.cost.sizes import ModelSizes, StepPlan, rank_layers, recomputed_layers

# 16-bit values of a layer that its backward needs, beside four of hidden size and two of all query
# heads: of all key heads, and of the width of a feed-forward block that is not gated.
KEPT_KEYS, PLAIN_FFN = 2, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes on the rank that needs most, and what they are.

    static: parameters, gradients, the optimizer's state, as sharded. activations: of all
    micro-batches in flight, and of the layer at work. gathered: what FSDP holds whole.
    """

    static: float
    activations: float
    logits: float
    gathered: float
    reserved: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.static + self.activations + self.logits + self.gathered + self.reserved


def step_memory(sizes: ModelSizes, plan: StepPlan, software: Software) -> StepMemory:
    """Return the bytes of one step. Raises `PlanError` for an unknown schedule."""
    return fullest(memory_ranks(sizes, plan, software), sizes, plan)


def fullest(ranks: Sequence[RankMemory], sizes: ModelSizes, plan: StepPlan) -> StepMemory:
    """Return the bytes of the rank of `memory_ranks` that has most, as `plan` recomputes."""
    mixes = recomputed_layers(plan, sizes.layers)
    most = max(ranks, key=lambda rank: rank.total(mixes[rank.rank]))
    return most.with_mix(mixes[most.rank])


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """What a pipeline rank holds, whatever it recomputes.

    kept: bytes of one micro-batch in one layer between forward and backward, by recompute; whole:
    without any, which a split backward leaves for its weight part too, since that needs the inputs
    of products and the gradients of their outputs.
    """

    rank: int
    layers: int
    in_flight: Sequence[InFlight]
    kept: Mapping[str, float]
    working: float
    static: float
    logits: float
    gathered: float
    reserved: float

    def activations(self, mix: tuple[float, float]) -> float:
        """Return the bytes of activations if so many layers are recomputed in part, and whole."""
        in_part, whole = mix
        kept = (self.layers - in_part - whole) * self.kept["none"]
        kept += in_part * self.kept["selective"] + whole * self.kept["full"]
        left = self.layers * self.kept["none"]
        return max([a * kept + w * left for a, w in self.in_flight]) + self.working

    def total(self, mix: tuple[float, float]) -> float:
        """Return all bytes with a mix of recomputed layers."""
        others = self.static + self.logits + self.gathered + self.reserved
        return others + self.activations(mix)

    def with_mix(self, mix: tuple[float, float]) -> StepMemory:
        """Return what `total` is made of."""
        return StepMemory(
            static=self.static,
            activations=self.activations(mix),
            logits=self.logits,
            gathered=self.gathered,
            reserved=self.reserved,
        )

    def least_mix(self, memory_bytes: float, again: Mapping[str, float]) -> tuple[int, int] | None:
        """Return the mix that fits and takes least, for the seconds of each; None if none fits.

        As many layers in part as it takes, and whole in their place where that is not enough; or
        whole ones alone.
        """
        needed = self.total((0, 0)) - memory_bytes
        if needed <= 0:
            return 0, 0
        if self.total((0, self.layers)) > memory_bytes:
            return None
        needed /= max(alive for alive, _ in self.in_flight)
        in_part, whole = (self.kept["none"] - self.kept[kind] for kind in ("selective", "full"))
        alone = (0, min(self.layers, ceil(needed / whole)))
        found = [alone, (0, self.layers)]  # the last where another pair of `in_flight` has more
        if 0 < in_part < whole:
            count = max(0, ceil((needed - self.layers * in_part) / (whole - in_part)))
            both = min(self.layers - count, ceil((needed - count * whole) / in_part)), count
            found.append(both)
        fitting = [mix for mix in found if min(mix) >= 0 and self.total(mix) <= memory_bytes]
        return min(fitting, key=lambda mix: mix[0] * again["selective"] + mix[1] * again["full"])


def memory_ranks(sizes: ModelSizes, plan: StepPlan, software: Software) -> list[RankMemory]:
    """Return the ranks of which one has most, or all that recompute something else."""
    every = plan.turns or plan.recompute == "auto"
    ranks = range(plan.pp) if every else sorted({0, min(1, plan.pp - 1), plan.pp - 1})
    kept = _kept_bytes(sizes, plan, software)
    pipeline = Pipeline(
        pp=plan.pp,
        chunks=plan.chunks,
        num_microbatches=plan.num_microbatches,
        forward=1.0,
        backward=1.0,
        weight=1.0,
    )
    in_flight, layers = form(plan.schedule).in_flight, rank_layers(plan, sizes.layers)
    of_layer, end = layer_parameters(sizes, plan), sizes.vocabulary_parameters / plan.tp
    logits = min(plan.tokens * sizes.vocab / plan.tp, software.loss_chunk) * software.loss_width
    last = 0 if plan.turns else plan.pp - 1
    found = []
    for rank in ranks:
        ends = (rank == 0) + (rank == last)
        ends = min(1, ends) if sizes.tied else ends
        static = static_bytes(sizes, plan, software, layers[rank] * of_layer + ends * end)
        found.append(
            RankMemory(
                rank=rank,
                layers=layers[rank],
                in_flight=in_flight(pipeline, rank),
                kept=kept,
                working=software.working * kept["none"],
                static=static,
                logits=logits if rank == last else 0.0,
                gathered=2 * (2 * of_layer + ends * end) if plan.zero == 3 else 0.0,
                reserved=software.reserved_bytes,
            )
        )
    return found


def activation_bytes(sizes: ModelSizes, plan: StepPlan, software: Software) -> float:
    """Return the bytes that one micro-batch leaves for the backward of one layer."""
    kept = _kept_bytes(sizes, plan, software)
    return kept["none"] + (kept[plan.recompute] - kept["none"]) * plan.recompute_share


def _kept_bytes(sizes: ModelSizes, plan: StepPlan, software: Software) -> dict[str, float]:
    """Of one micro-batch in one layer, by what is recomputed."""
    whole = _layer_activations(sizes, plan, software)
    sharded = plan.tp if plan.sequence_parallel else 1
    if not software.fused_attention:
        in_part = whole - _scores(sizes, plan)
    elif software.selective_products:
        in_part = whole / 2
    else:  # what the norms and the activation return
        activation = _ffn_values(sizes, software) - (sizes.ffn_matrices - 1)
        made_again = 2 * sizes.hidden / sharded + activation * sizes.ffn * sizes.top_k / plan.tp
        in_part = whole - 2 * plan.tokens * made_again
    full = 2 * plan.tokens * sizes.hidden / sharded
    return {"none": whole, "selective": in_part, "full": full}


def static_bytes(sizes: ModelSizes, plan: StepPlan, software: Software, parameters: float) -> float:
    """Return the bytes of `parameters` of one rank with all that training adds, as sharded."""
    group = (plan.zero_group or plan.dp * plan.cp) if plan.zero else 1
    parameter, gradient, state = software.static_widths
    if plan.zero == 3:
        return parameters * (parameter + gradient + state) / group
    shared = gradient / group if plan.zero == 2 else gradient
    return parameters * (parameter + shared + state / group)


def _layer_activations(sizes: ModelSizes, plan: StepPlan, software: Software) -> float:
    """Of one micro-batch in one layer, nothing computed again."""
    hidden, width = sizes.hidden, sizes.width
    whole = 2 * hidden * (1 + software.dropout / 2)  # the inputs of two norms, masks
    inside = 2 * hidden + 2 * width + KEPT_KEYS * width * sizes.kv_heads / sizes.heads
    inside += _ffn_values(sizes, software) * sizes.ffn * sizes.top_k
    if not plan.sequence_parallel:
        # the inputs of the products, which every rank has whole
        whole, inside = whole + 2 * hidden, inside - 2 * hidden
    values = whole / (plan.tp if plan.sequence_parallel else 1) + inside / plan.tp
    kept = 2 * plan.tokens * values
    if software.fused_attention:
        return kept + 4 * plan.tokens * sizes.heads / plan.tp
    return kept + _scores(sizes, plan)


def _ffn_values(sizes: ModelSizes, software: Software) -> int:
    return PLAIN_FFN if sizes.ffn_matrices == 2 else software.kept_ffn


def _scores(sizes: ModelSizes, plan: StepPlan) -> float:
    """Scores before and after their softmax, and a mask of dropout."""
    return 5 * plan.tokens * sizes.heads * plan.seq / plan.tp
