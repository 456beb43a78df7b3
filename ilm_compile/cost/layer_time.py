"""The seconds of one micro-batch in a layer, in the embedding and in the head, on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch

from ilm_compile.cost.collectives import collective_time
from ilm_compile.cost.constants import Software
from ilm_compile.cost.hardware import Hardware
from ilm_compile.cost.sizes import ModelSizes, StepPlan
from ilm_compile.errors import PlanError

PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
KERNELS = 20  # of one layer's forward
ATTENTION_BACKWARD = 2.5  # a fused kernel's backward computes its forward again


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """forward, backward: all that the rank waits for. weight: the part of the backward that is for
    the weights alone. communication: how much of forward and backward it is that."""

    forward: float
    backward: float
    weight: float
    communication: float


@dataclass(frozen=True, slots=True)
class _Rates:
    """Seconds per FLOP of products and of attention, per byte, per byte of a product's operands."""

    product: float
    attention: float
    byte: float
    operand_byte: float

    def multiply(self, m: float, n: float, k: float, count: float = 1) -> float:
        """The seconds of `count` products (m, k) x (k, n)."""
        num_bytes = 2 * (m * n + n * k + m * k)
        return count * (2 * m * n * k * self.product + num_bytes * self.operand_byte)


def rates(plan: StepPlan, hardware: Hardware) -> _Rates:
    """Return what a FLOP and a byte take. Raises `PlanError` for a precision without a peak."""
    dtype = PRECISIONS.get(plan.precision)
    if dtype is None or dtype not in hardware.peak_flops:
        known = [name for name, dtype in PRECISIONS.items() if dtype in hardware.peak_flops]
        raise PlanError(
            f"cost: no peak FLOP/s of {hardware.name} for precision {plan.precision!r}; "
            f"known: {', '.join(known)}"
        )
    return _Rates(
        product=1 / hardware.usable_flops(dtype),
        attention=1 / hardware.attention_flops(torch.bfloat16),
        byte=1 / hardware.usable_bandwidth,
        operand_byte=1 / hardware.operand_bandwidth,
    )


def layer_time(
    sizes: ModelSizes, plan: StepPlan, hardware: Hardware, software: Software
) -> LayerTime:
    """Return the seconds of one layer that is recomputed as `plan.recompute` says.

    Recomputing counts as backward; FSDP runs beside it.
    """
    rate = rates(plan, hardware)
    products = _products(sizes, plan, rate)
    attention, attention_backward = _attention(sizes, plan, rate, software)
    traffic = _traffic(sizes, plan, rate, software)
    launches = KERNELS * hardware.kernel_overhead_s
    moved = _tensor_parallel(sizes, plan, hardware, software)
    moved += _other_axes(sizes, plan, hardware)

    alone = products + attention + traffic + launches
    again, moved_again = {
        "none": (0.0, 0.0),
        "selective": (
            traffic + software.selective_products * products
            if software.fused_attention
            else attention,
            0.0,
        ),
        "full": (alone, moved),
    }[plan.recompute]
    summing = software.gradient_bytes * rate.byte * layer_parameters(sizes, plan)
    back = 2 * (products + traffic + launches) + attention_backward + again + summing

    host, host_back = host_time(plan.tp, software, plan.recompute)
    gather, reduce = _fsdp(sizes, plan, hardware, software)
    forward = beside(max(alone + moved, host), gather, software)
    moved_back = moved + moved_again
    again_gather = gather if plan.zero == 3 else 0.0
    backward = beside(max(back + moved_back, host_back), again_gather + reduce, software)
    hidden = max(alone, host) + max(back, host_back)
    return LayerTime(
        forward=forward,
        backward=backward,
        weight=products + summing,
        communication=forward + backward - hidden,
    )


def host_time(tp: int, software: Software, recompute: str) -> tuple[float, float]:
    """Return the seconds that the host takes to start the forward and the backward of a layer."""
    host = software.host_layer_s * (1 + software.host_tp * ((tp - 1) / 7) ** 2)
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[recompute]
    return host, host * (software.host_backward + again)


def head_time(
    sizes: ModelSizes, plan: StepPlan, hardware: Hardware, software: Software
) -> tuple[float, float]:
    """Return the seconds of a micro-batch, forward and backward, in embedding and head."""
    rate = rates(plan, hardware)
    tokens, hidden = plan.tokens, sizes.hidden
    columns = sizes.vocab / plan.tp
    logits = 2 * software.loss_traffic * tokens * columns * rate.byte
    summing = software.gradient_bytes * columns * hidden * rate.byte
    products = 3 if software.loss_chunk == inf else 4
    head = products * rate.multiply(tokens, columns, hidden) + logits + summing
    embedding = 12 * tokens * hidden * rate.byte + summing
    return embedding, max(head, software.host_microbatch_s)


def layer_parameters(sizes: ModelSizes, plan: StepPlan) -> float:
    """Return the parameters of a layer on one rank, as it computes with them."""
    return (sizes.attention_parameters + sizes.expert_parameters / plan.ep) / plan.tp


def _products(sizes: ModelSizes, plan: StepPlan, rate: _Rates) -> float:
    tokens, hidden, tp = plan.tokens, sizes.hidden, plan.tp
    width, up = sizes.ffn / tp, sizes.ffn_matrices - 1
    held = sizes.experts / plan.ep
    rows = tokens * sizes.top_k * plan.ep / sizes.experts  # of one expert, all in balance
    return (
        rate.multiply(tokens, sizes.qkv / tp, hidden)
        + rate.multiply(tokens, hidden, sizes.width / tp)
        + rate.multiply(rows, up * width, hidden, held)
        + rate.multiply(rows, hidden, width, held)
    )


def _attention(
    sizes: ModelSizes, plan: StepPlan, rate: _Rates, software: Software
) -> tuple[float, float]:
    """The scores and the weighted values: forward, backward."""
    sequences, seq = plan.micro_batch / (plan.tp * plan.cp), plan.seq
    if software.fused_attention:
        forward = 2 * sequences * seq * seq * sizes.width * rate.attention
        return forward, ATTENTION_BACKWARD * forward
    heads = sequences * sizes.heads
    scores = 2 * heads * seq * seq * software.scores_traffic * rate.byte
    forward = 2 * rate.multiply(seq, seq, sizes.width / sizes.heads, heads) + scores
    return forward, 2 * forward


def _traffic(sizes: ModelSizes, plan: StepPlan, rate: _Rates, software: Software) -> float:
    """What the rest of a layer reads and writes."""
    whole = 8 * sizes.hidden / (plan.tp if plan.sequence_parallel else 1)
    up = (sizes.ffn_matrices - 1) * sizes.ffn * sizes.top_k
    values = plan.tokens * (whole + (4 * sizes.width + 3 * up) / plan.tp)
    return 2 * values * software.layer_traffic * rate.byte


def _tensor_parallel(
    sizes: ModelSizes, plan: StepPlan, hardware: Hardware, software: Software
) -> float:
    """After attention and after the feed-forward block, nothing beside it."""
    if plan.tp == 1:
        return 0.0
    num_bytes = 2 * plan.tokens * sizes.hidden
    kinds = ("all_gather", "reduce_scatter") if plan.sequence_parallel else ("all_reduce",)
    once = sum(collective_time(kind, num_bytes, plan.tp, hardware) for kind in kinds)
    return 2 * (once + software.tp_wait_s)


def _other_axes(sizes: ModelSizes, plan: StepPlan, hardware: Hardware) -> float:
    """cp: heads exchanged for the sequence and back; ep: tokens sent to experts and back."""
    seconds = 0.0
    num_bytes = 2 * plan.tokens * sizes.hidden / plan.tp
    if plan.cp > 1:
        columns = (sizes.qkv + sizes.width) / sizes.hidden
        held = num_bytes * columns * plan.cp
        seconds += collective_time("all_to_all", held, plan.cp, hardware, stride=plan.tp)
    if plan.ep > 1:
        held = num_bytes * sizes.top_k * plan.ep
        seconds += 2 * collective_time("all_to_all", held, plan.ep, hardware, stride=plan.tp)
    return seconds


def _fsdp(
    sizes: ModelSizes, plan: StepPlan, hardware: Hardware, software: Software
) -> tuple[float, float]:
    """Gathering a layer's parameters, and scattering the sums of its gradients."""
    ranks = plan.dp * plan.cp
    if plan.zero < 2 or ranks == 1 or software.gradients_once:
        return 0.0, 0.0  # or all of it at once, in `data_parallel`
    attention = sizes.attention_parameters / plan.tp
    experts = sizes.expert_parameters / (plan.tp * plan.ep)

    def move(kind: str) -> float:
        seconds = collective_time(kind, 2 * attention, ranks, hardware, stride=plan.tp)
        stride = plan.tp * plan.ep
        return seconds + collective_time(
            kind, 2 * experts, max(1, ranks // plan.ep), hardware, stride=stride
        )

    gather = move("all_gather")
    # zero=2 keeps the parameters from one micro-batch to the next
    return gather if plan.zero == 3 else gather / plan.num_microbatches, move("reduce_scatter")


def beside(compute: float, moved: float, software: Software) -> float:
    """Return the seconds of both, where FSDP moves parameters or gradients beside compute."""
    return max(compute, moved) + software.exposed * min(compute, moved)
