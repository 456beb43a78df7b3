"""The seconds of one training step of a plan, on one machine, with one training program."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, log2

from ilm_compile.cost.collectives import collective_time
from ilm_compile.cost.constants import Software
from ilm_compile.cost.hardware import Hardware
from ilm_compile.cost.layer_time import head_time, layer_parameters, layer_time
from ilm_compile.cost.links import Link
from ilm_compile.cost.pipeline_time import Pipeline, form
from ilm_compile.cost.sizes import ModelSizes, StepPlan, stage_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """The seconds of a step, `total`, and what they are made of on the slowest rank.

    exposed: communication that nothing hides, in the layers, between stages and at the end.
    """

    total: float
    bubble: float
    exposed: float
    optimizer: float


def step_time(
    sizes: ModelSizes, plan: StepPlan, hardware: Hardware, software: Software
) -> StepTime:
    """Return the seconds of one step.

    The hosts of one node are `hardware.gpus_per_node` ranks, tp closest together, then cp, dp, pp.
    Raises `PlanError` for an unknown schedule or a precision the hardware has no peak of.
    """
    hardware = on_network(hardware, software)
    layer = layer_time(sizes, plan, hardware, software)
    embedding, head = head_time(sizes, plan, hardware, software)
    layers = stage_layers(sizes.layers, plan.pp)
    per_layer = layer.forward + layer.backward
    pipeline = Pipeline(
        pp=plan.pp,
        chunks=plan.chunks,
        num_microbatches=plan.num_microbatches,
        forward=layers.middle * layer.forward,
        backward=layers.middle * (layer.backward - layer.weight),
        weight=layers.middle * layer.weight,
        first=embedding + (layers.first - layers.middle) * per_layer,
        last=head + (layers.last - layers.middle) * per_layer * (plan.pp > 1),
        message=_message(sizes, plan, hardware, software),
    )
    span = form(plan.schedule).span(pipeline)
    still = replace(pipeline, message=0.0)
    bubble = form(plan.schedule).span(still) - pipeline.busy
    gradients = _gradients(sizes, plan, hardware, software)
    optimizer = _optimizer(sizes, plan, hardware, software)
    nodes = max(1.0, plan.gpus / hardware.gpus_per_node)
    slowest = 1 + software.jitter * log2(nodes)
    inside = plan.num_microbatches * layers.middle * layer.communication
    return StepTime(
        total=slowest * (span + gradients + optimizer),
        bubble=bubble,
        exposed=inside + (span - pipeline.busy - bubble) + gradients,
        optimizer=optimizer,
    )


def rank_parameters(sizes: ModelSizes, plan: StepPlan) -> float:
    """Return the parameters of the rank that has most, before anything is sharded over dp."""
    layers = stage_layers(sizes.layers, plan.pp)
    of_layer = layer_parameters(sizes, plan)
    end = sizes.vocabulary_parameters / plan.tp
    ends = end if plan.pp > 1 or sizes.tied else 2 * end
    return max(layers.middle * of_layer, max(layers.first, layers.last) * of_layer + ends)


@lru_cache(maxsize=64)
def on_network(hardware: Hardware, software: Software) -> Hardware:
    """Return the machine with the network that the software's collectives make of it."""
    network = Link(
        latency_s=software.network_latency_s,
        s_per_byte=1 / (software.network * hardware.nic_bytes_per_s),
    )
    return replace(hardware, network=network)


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


def _optimizer(sizes: ModelSizes, plan: StepPlan, hardware: Hardware, software: Software) -> float:
    ranks = (plan.zero_group or plan.dp * plan.cp) if plan.zero else 1
    num_bytes = software.optimizer_bytes * rank_parameters(sizes, plan) / ranks
    return num_bytes / hardware.usable_bandwidth + software.host_step_s
