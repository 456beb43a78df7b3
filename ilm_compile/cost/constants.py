"""What no data sheet says: the fitted constants of `step_time` and `step_memory`, in one place.

`python -m benchmarks.fit_costs ROWS.csv` fits them to published step times and prints this table.
An `Efficiency` belongs to a generation of devices, `Software` to what runs on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ilm_compile.errors import PlanError


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """What a generation of devices keeps up through a step, as shares of its 16-bit peak.

    matmul: of a large product, without what `Software.tile_bandwidth` takes of smaller ones; less
    than alone, since clocks fall under load. attention: of a fused kernel, causal FLOPs counted.
    """

    matmul: float
    attention: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Software:
    """A training program: what it fuses, what its host costs, what it hides."""

    name: str
    fused_attention: bool = True
    """Whether attention keeps its scores on chip."""
    tile_bandwidth: float
    """Of a product's reads and writes that nothing hides, as a multiple of memory bandwidth."""
    scores_traffic: float
    """Times that unfused attention reads or writes its scores in one forward."""
    layer_traffic: float
    """Norms, activations, residuals, against an eager layer's 8 h + 4 h + 3 f values a token."""
    loss_traffic: float
    """16-bit values moved per logit by the loss, forward and backward."""
    gradient_bytes: float
    """Bytes moved per parameter to add up its gradient, each micro-batch."""
    optimizer_bytes: float = 28.0
    """Bytes moved per parameter by Adam with float32 state."""
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
    loss_width: float = 8.0
    """Bytes per logit at the loss."""
    working: float = 1.0
    """What a layer's backward needs beside what was kept for it, against a layer's activations."""
    reserved_bytes: float = 1e9
    """Memory of CUDA, NCCL, buffers and the allocator's gaps that counts as used."""


AMPERE = Efficiency(matmul=0.815, attention=0.329)
HOPPER = Efficiency(matmul=0.707, attention=0.175)

# What no row names is taken from here: fused attention, a fully sharded eager program.
SHARED = Software(
    name="ilm_compile",
    tile_bandwidth=2.34,
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
SOFTWARE: Mapping[str, Software] = {
    software.name: software
    for software in (
        replace(SHARED, static_widths=(4.0, 4.0, 8.0)),
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
