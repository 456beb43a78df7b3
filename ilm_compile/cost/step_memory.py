"""The memory of one training step of a plan, on the rank that needs most."""

from __future__ import annotations

from dataclasses import dataclass

from ilm_compile.cost.constants import Software
from ilm_compile.cost.layer_time import layer_parameters
from ilm_compile.cost.pipeline_time import Pipeline, form
from ilm_compile.cost.sizes import ModelSizes, StepPlan, stage_layers

# 16-bit values of a layer that its backward needs, beside four of hidden size and two of all query
# heads: of all key heads, and of the feed-forward width by its number of matrices.
KEPT_KEYS, KEPT_FFN = 2, {2: 2, 3: 4}


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
    ranks = sorted({0, min(1, plan.pp - 1), plan.pp - 1})
    return max((_rank(sizes, plan, software, rank) for rank in ranks), key=lambda m: m.total)


def activation_bytes(sizes: ModelSizes, plan: StepPlan, software: Software) -> float:
    """Return the bytes that one micro-batch leaves for the backward of one layer."""
    whole = _layer_activations(sizes, plan, software)
    sharded = plan.tp if plan.sequence_parallel else 1
    kept = {
        "none": whole,
        "selective": whole / 2 if software.fused_attention else whole - _scores(sizes, plan),
        "full": 2 * plan.tokens * sizes.hidden / sharded,
    }[plan.recompute]
    return whole + (kept - whole) * plan.recompute_share


def static_bytes(sizes: ModelSizes, plan: StepPlan, software: Software, parameters: float) -> float:
    """Return the bytes of `parameters` of one rank with all that training adds, as sharded."""
    group = (plan.zero_group or plan.dp * plan.cp) if plan.zero else 1
    parameter, gradient, state = software.static_widths
    if plan.zero == 3:
        return parameters * (parameter + gradient + state) / group
    shared = gradient / group if plan.zero == 2 else gradient
    return parameters * (parameter + shared + state / group)


def _rank(sizes: ModelSizes, plan: StepPlan, software: Software, rank: int) -> StepMemory:
    layers = stage_layers(sizes.layers, plan.pp)
    is_first, is_last = rank == 0, rank == plan.pp - 1
    held = layers.first if is_first else layers.last if is_last else layers.middle
    ends = (is_first + is_last) if not sizes.tied else max(is_first, is_last)
    end = sizes.vocabulary_parameters / plan.tp
    of_layer = layer_parameters(sizes, plan)
    pipeline = Pipeline(
        pp=plan.pp,
        chunks=plan.chunks,
        num_microbatches=plan.num_microbatches,
        forward=1.0,
        backward=1.0,
        weight=1.0,
    )
    in_flight = form(plan.schedule).in_flight(pipeline, rank)
    kept = activation_bytes(sizes, plan, software)
    working = software.working * _layer_activations(sizes, plan, software)
    logits = plan.tokens * sizes.vocab / plan.tp * software.loss_width
    return StepMemory(
        static=static_bytes(sizes, plan, software, held * of_layer + ends * end),
        activations=in_flight * held * kept + working,
        logits=logits if is_last else 0.0,
        gathered=2 * (2 * of_layer + ends * end) if plan.zero == 3 else 0.0,
        reserved=software.reserved_bytes,
    )


def _layer_activations(sizes: ModelSizes, plan: StepPlan, software: Software) -> float:
    """Of one micro-batch in one layer, nothing computed again."""
    hidden, width = sizes.hidden, sizes.width
    whole = 2 * hidden * (1 + software.dropout / 2)  # the inputs of two norms, masks
    inside = 2 * hidden + 2 * width + KEPT_KEYS * width * sizes.kv_heads / sizes.heads
    inside += KEPT_FFN.get(sizes.ffn_matrices, 4) * sizes.ffn * sizes.top_k
    if not plan.sequence_parallel:
        # the inputs of the products, which every rank has whole
        whole, inside = whole + 2 * hidden, inside - 2 * hidden
    values = whole / (plan.tp if plan.sequence_parallel else 1) + inside / plan.tp
    kept = 2 * plan.tokens * values
    if software.fused_attention:
        return kept + 4 * plan.tokens * sizes.heads / plan.tp
    return kept + _scores(sizes, plan)


def _scores(sizes: ModelSizes, plan: StepPlan) -> float:
    """Scores before and after their softmax, and a mask of dropout."""
    return 5 * plan.tokens * sizes.heads * plan.seq / plan.tp
