"""The seconds of one training step of a plan, on one machine, with one training program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil, log2

from ilm_compile.cost.collectives import collective_time
from ilm_compile.cost.constants import Software
from ilm_compile.cost.data_parallel import (
    Share,
    crowd,
    exposed_seconds,
    moved_seconds,
    on_network,
    optimizer_seconds,
    slowest,
)
from ilm_compile.cost.hardware import Hardware
from ilm_compile.cost.layer_time import LayerTime, head_time, layer_parameters, layer_time
from ilm_compile.cost.pipeline import Pipeline
from ilm_compile.cost.pipeline_time import form
from ilm_compile.cost.sizes import ModelSizes, StepPlan, recomputed_layers, stage_layers

RECOMPUTE = ("none", "selective", "full")
TENSORS = 9  # parameters of a layer


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """The seconds of a step, `total`, and what they are made of on the slowest rank.

    exposed: communication that nothing hides, in the layers, between stages and at the end. again:
    what is recomputed.
    """

    total: float
    bubble: float
    exposed: float
    optimizer: float
    again: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCosts:
    """What a step is made of, whatever its schedule and what it recomputes; in seconds.

    layers: of one layer, by recompute. moved: by our own FSDP, hidden or not. crowd: how much
    longer ranks take that share cores; slowest: what the slowest node takes, against the others.
    """

    sizes: ModelSizes
    software: Software
    layers: Mapping[str, LayerTime]
    embedding: float
    head: float
    message: float
    moved: float
    gradients: float
    optimizer: float
    crowd: float
    slowest: float

    def pipeline(self, plan: StepPlan) -> Pipeline:
        """Return the times of the ranks of a plan."""
        layer, ranks = self.layers["none"], stage_layers(self.sizes.layers, plan.pp)
        per_layer = layer.forward + layer.backward
        return Pipeline(
            pp=plan.pp,
            chunks=plan.chunks,
            num_microbatches=plan.num_microbatches,
            forward=ranks.middle * layer.forward,
            backward=ranks.middle * (layer.backward - layer.weight),
            weight=ranks.middle * layer.weight,
            first=self.embedding + (ranks.first - ranks.middle) * per_layer,
            last=self.head + (ranks.last - ranks.middle) * per_layer * (plan.pp > 1),
            again=tuple(
                (in_part and in_part * self.again("selective"))
                + (whole and whole * self.again("full"))
                for in_part, whole in recomputed_layers(plan, self.sizes.layers)
            ),
            message=self.message,
            turns=plan.turns,
        )

    def again(self, recompute: str) -> float:
        """Return how much longer a layer's backward is that recomputes something."""
        return self.layers[recompute].backward - self.layers["none"].backward

    def _inside(self, plan: StepPlan) -> float:
        """Communication in the layers of a rank that has as many as most."""
        held = {"none": float(stage_layers(self.sizes.layers, plan.pp).middle)}
        mixes = recomputed_layers(plan, self.sizes.layers)
        for place, recompute in enumerate(("selective", "full")):
            if most := max(mix[place] for mix in mixes):
                held[recompute], held["none"] = most, held["none"] - most
        seconds = sum(count * self.layers[kind].communication for kind, count in held.items())
        return plan.num_microbatches * seconds

    def total(self, plan: StepPlan, spans: tuple[float, float] | None = None) -> StepTime:
        """Return the step of a plan that `spans` take with its messages and without, if known."""
        pipeline = self.pipeline(plan)
        if spans is None:
            of = form(plan.schedule).span
            spans = of(pipeline), of(replace(pipeline, message=0.0))
        span = max(spans[0], pipeline.average * self.crowd)
        bubble = spans[1] - pipeline.busy
        moved = exposed_seconds(self.crowd * self.moved, span, self.software)
        gradients = self.gradients + moved
        return StepTime(
            total=self.slowest * (span + gradients + self.optimizer),
            bubble=bubble,
            exposed=self._inside(plan) + (spans[0] - pipeline.busy - bubble) + gradients,
            optimizer=self.optimizer,
            again=plan.num_microbatches * max(pipeline.again),
        )


def step_costs(
    sizes: ModelSizes,
    plan: StepPlan,
    hardware: Hardware,
    software: Software,
    recompute: Iterable[str] = RECOMPUTE,
) -> StepCosts:
    """Return what the step of a plan is made of; recompute: what may be asked of it.

    The hosts of one node are `hardware.gpus_per_node` ranks, tp closest together, then cp, dp, pp.
    Raises `PlanError` for a precision the hardware has no peak of.
    """
    hardware = on_network(hardware, software)
    embedding, head = head_time(sizes, plan, hardware, software)
    crowded = crowd(plan.gpus, hardware)
    share, moved, gradients = _share(sizes, plan), 0.0, 0.0
    if software.gradients_once and plan.zero:
        moved = moved_seconds(share, hardware, software)
    else:
        gradients = _gradients(sizes, plan, hardware, software)
    return StepCosts(
        sizes=sizes,
        software=software,
        layers={
            kind: layer_time(sizes, replace(plan, recompute=kind), hardware, software)
            for kind in recompute
        },
        embedding=embedding,
        head=head,
        message=_message(sizes, plan, hardware, software),
        moved=moved,
        gradients=gradients,
        optimizer=crowded * optimizer_seconds(share, hardware, software),
        crowd=crowded,
        slowest=slowest(plan.gpus, hardware, software),
    )


def step_time(
    sizes: ModelSizes, plan: StepPlan, hardware: Hardware, software: Software
) -> StepTime:
    """Return the seconds of one step; see `step_costs`. Raises `PlanError` as it and `form` do."""
    kinds = RECOMPUTE if plan.recompute == "auto" else {"none", plan.recompute}
    return step_costs(sizes, plan, hardware, software, kinds).total(plan)


def _share(sizes: ModelSizes, plan: StepPlan) -> Share:
    layers = sizes.layers / plan.pp
    return Share(
        elements=rank_parameters(sizes, plan),
        units=layers + 1,
        parameters=(layers + 1) * TENSORS,
        ranks=(plan.zero_group or plan.dp * plan.cp) if plan.zero else 1,
        stride=plan.tp,
        width=4 if plan.precision == "fp32" else 2,
        zero=plan.zero,
        num_microbatches=plan.num_microbatches,
    )


def rank_parameters(sizes: ModelSizes, plan: StepPlan) -> float:
    """Return the parameters of the rank that has most, before anything is sharded over dp."""
    layers = stage_layers(sizes.layers, plan.pp)
    of_layer = layer_parameters(sizes, plan)
    end = sizes.vocabulary_parameters / plan.tp
    ends = end if plan.pp > 1 or sizes.tied else 2 * end
    return max(layers.middle * of_layer, max(layers.first, layers.last) * of_layer + ends)


def _message(sizes: ModelSizes, plan: StepPlan, hardware: Hardware, software: Software) -> float:
    """From one stage to the next, the slowest of them."""
    if plan.pp == 1:
        return 0.0
    share = plan.tp if plan.sequence_parallel or software.scattered_messages else 1
    num_bytes = 2 * plan.tokens * sizes.hidden / share
    stride = plan.tp * plan.cp * plan.dp
    crosses = stride * plan.pp > hardware.gpus_per_node
    return collective_time(
        "p2p", num_bytes, 2, hardware, stride=hardware.gpus_per_node if crosses else stride
    )


def _gradients(sizes: ModelSizes, plan: StepPlan, hardware: Hardware, software: Software) -> float:
    """Summing gradients and giving out parameters after the last backward; FSDP's are inside."""
    ranks = plan.dp * plan.cp
    if ranks == 1 or plan.zero >= 2:
        return 0.0
    held = rank_parameters(sizes, plan)

    def move(kind: str, width: int, size: int) -> float:
        return collective_time(kind, width * held, size, hardware, stride=plan.tp)

    if plan.zero == 0:
        return move("all_reduce", software.gradient_width, ranks)
    group = plan.zero_group or ranks
    if group < ranks:
        summing = move("all_reduce", software.gradient_width, ranks)
        return summing + move("all_gather", 2, group)
    summing = move("reduce_scatter", software.gradient_width, ranks)
    if software.whole_tensors and ranks * plan.tp > hardware.gpus_per_node:
        nodes = ceil(ranks * plan.tp / hardware.gpus_per_node)
        latency = ranks * hardware.network.latency_s * log2(nodes)
        return summing + latency + hardware.network.transfer_s(2 * held)
    return summing + move("all_gather", 2, ranks)
