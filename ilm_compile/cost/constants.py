"""What no data sheet says: the fitted constants of `step_time` and `step_memory`, in one place.

`python -m benchmarks.fit_costs ROWS.csv` fits them to published step times and prints this table.
An `Efficiency` belongs to a generation of devices, `Software` to what runs on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

from ilm_compile.errors import PlanError


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """What a generation of devices keeps up through a step, as shares of its 16-bit peak.

    matmul: of a large product, without what its operands take beside it; less than alone, since
    clocks fall under load. attention: of a fused kernel, causal FLOPs counted. operands: bytes/s of
    what a product reads and writes and nothing hides, as a multiple of usable memory bandwidth.
    """

    matmul: float
    attention: float
    operands: float = inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Software:
    """A training program: what it fuses, what its host costs, what it hides."""

    name: str
    fused_attention: bool = True
    """Whether attention keeps its scores on chip."""
    scores_traffic: float
    """Times that unfused attention reads or writes its scores in one forward."""
    layer_traffic: float
    """Norms, activations, residuals, against an eager layer's 8 h + 4 h + 3 f values a token."""
    loss_traffic: float
    """16-bit values moved per logit by the loss, forward and backward."""
    gradient_bytes: float
    """Bytes moved per parameter to add up its gradient, each micro-batch."""
    optimizer_bytes: float = 28.0
    """Bytes moved per parameter by Adam with float32 state, and by the norm and clipping."""
    host_layer_s: float
    """Seconds the host takes to start the forward of one layer."""
    host_backward: float
    """The host's time of a backward, against that of a forward."""
    host_tp: float
    """How much longer the hosts of 8 tensor-parallel ranks take, waiting for each other."""
    host_microbatch_s: float
    """Seconds the host takes for what is no layer, each micro-batch."""
    host_step_s: float
    """Seconds of the host per step: the optimizer, the norm, logging."""
    tp_wait_s: float
    """Seconds by which tensor-parallel ranks arrive apart at what is collective in a block."""
    exposed: float
    """Share of the shorter one that does not hide, where FSDP runs beside compute."""
    network: float
    """Share of the NIC's line rate that its collectives reach."""
    network_latency_s: float
    """Seconds of one step of a tree between nodes."""
    gradients_once: bool = False
    """Whether FSDP moves gradients with any zero, beside compute, and once a step."""
    whole_tensors: bool = False
    """Whether an optimizer state sharded over nodes owns whole tensors, broadcast one by one."""
    scattered_messages: bool = False
    """Whether each tensor-parallel rank sends its part of what passes between stages."""
    jitter: float
    """Growth of the step for each doubling of nodes, for the slowest of them."""
    gradient_width: int = 2
    """Bytes of a gradient on the wire."""
    static_widths: tuple[float, float, float] = (2.0, 4.0, 12.0)
    """Bytes per parameter: of itself, its gradient, the optimizer's state with float32 copies."""
    dropout: bool = False
    """Whether masks of dropout are kept."""
    kept_ffn: int = 4
    """Values of the width of a gated feed-forward block that its backward needs, a token."""
    selective_products: float = 0.5
    """Of a layer's products, what a selective recompute repeats, where attention is fused."""
    loss_chunk: float = inf
    """Logits that the loss has at a time; where not all, backward makes them once more."""
    loss_width: float = 8.0
    """Bytes per logit at the loss."""
    working: float = 1.0
    """What a layer's backward needs beside what was kept for it, against a layer's activations."""
    reserved_bytes: float = 1e9
    """Memory of CUDA, NCCL, buffers and the allocator's gaps that counts as used."""
    kept_free: float = 0.06
    """Share of a device's memory that a search leaves to the caching allocator, which cannot use
    all that it has split, and to errors: at most 5.6% in published steps that were not fitted."""


AMPERE = Efficiency(matmul=0.815, attention=0.329, operands=2.34)
HOPPER = Efficiency(matmul=0.707, attention=0.175, operands=2.34)

OURS, PROCESSES = "ilm_compile", "ilm_compile, processes"
# What no row names is taken from here: fused attention, a fully sharded eager program.
SHARED = Software(
    name=OURS,
    scores_traffic=3.99,
    layer_traffic=1.45,
    loss_traffic=18.1,
    gradient_bytes=4.64,
    host_layer_s=0.4e-3,
    host_backward=0.209,
    host_tp=0.444,
    host_microbatch_s=1.58e-3,
    host_step_s=2.47e-3,
    tp_wait_s=56e-6,
    exposed=0.757,
    network=0.878,
    network_latency_s=60.1e-6,
    jitter=0.0057,
)
_MEGATRON = replace(
    SHARED,
    name="megatron",
    fused_attention=False,
    dropout=True,
    scattered_messages=True,
    layer_traffic=1.45,
    loss_traffic=5.41,
)
# This package, where it is known from its own code what is fitted elsewhere: float32 weights,
# gradients and moments; fused kernels, whose gated block keeps both halves and their product; a
# loss in pieces, whose logits are written and read once in forward, and one value more in backward;
# a selective recompute that repeats no product.
_OURS = replace(
    SHARED,
    static_widths=(4.0, 4.0, 8.0),
    gradient_width=4,
    gradients_once=True,
    optimizer_bytes=40.0,
    loss_traffic=5.0,
    loss_chunk=2.0**27,
    kept_ffn=3,
    selective_products=0.0,
)
SOFTWARE: Mapping[str, Software] = {
    software.name: software
    for software in (
        _OURS,
        # Ranks on the cores of a machine, whose figures are measured by `calibrate`: nothing runs
        # beside anything, and every op's host time is in its launch.
        replace(
            _OURS,
            name=PROCESSES,
            gradient_bytes=12.0,
            layer_traffic=1.0,
            loss_traffic=SHARED.loss_traffic,
            loss_chunk=inf,
            host_layer_s=0.0,
            host_microbatch_s=0.0,
            tp_wait_s=0.0,
            exposed=1.0,
            network=1.0,
            network_latency_s=200e-6,
            jitter=0.0,
        ),
        _MEGATRON,
        replace(
            _MEGATRON,
            name="megatron-deepspeed",
            layer_traffic=0.393,
            loss_traffic=47.1,
            host_layer_s=1.46e-3,
            network=0.211,
        ),
        replace(SHARED, name="llm-foundry"),
        replace(SHARED, name="torchtitan", layer_traffic=2.6),
        replace(SHARED, name="internevo", layer_traffic=2.6, network=0.566, whole_tensors=True),
    )
}


def software_named(name: str) -> Software:
    """Return the row of `SOFTWARE`; raises `PlanError` naming those that are known."""
    if name not in SOFTWARE:
        raise PlanError(f"cost: unknown software {name!r}; known are {', '.join(SOFTWARE)}")
    return SOFTWARE[name]
