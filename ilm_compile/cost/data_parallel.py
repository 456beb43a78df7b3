"""What data-parallel ranks of our own program do for each other once a step: FSDP, the optimizer.

Asked for a candidate of the search and for a compiled program alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import log2

from ilm_compile.cost.collectives import collective_time
from ilm_compile.cost.constants import OURS, PROCESSES, Software, software_named
from ilm_compile.cost.hardware import Hardware
from ilm_compile.cost.layer_time import beside
from ilm_compile.cost.links import Link


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What of a model `ranks` of them share that lie `stride` apart.

    elements: of the parameters that the fullest rank computes with; units, parameters: how many
    FSDP units those are, and tensors. width: bytes in which an element is gathered.
    """

    elements: float
    units: float
    parameters: float
    ranks: int
    stride: int
    width: int
    zero: int
    num_microbatches: float


def software_of(hardware: Hardware) -> Software:
    """Return this package's row for a machine."""
    return software_named(PROCESSES if hardware.cores else OURS)


@lru_cache(maxsize=64)
def on_network(hardware: Hardware, software: Software) -> Hardware:
    """Return the machine with the network that the software's collectives make of it."""
    network = Link(
        latency_s=software.network_latency_s,
        s_per_byte=1 / (software.network * hardware.nic_bytes_per_s),
    )
    return replace(hardware, network=network)


def crowd(num_ranks: int, hardware: Hardware) -> float:
    """Return how much longer ranks take that share the cores of a machine; 1 if they do not."""
    return max(1.0, num_ranks / hardware.cores) if hardware.cores else 1.0


def slowest(num_ranks: int, hardware: Hardware, software: Software) -> float:
    """Return how much longer a step takes for the slowest of several nodes."""
    return 1 + software.jitter * log2(max(1.0, num_ranks / hardware.gpus_per_node))


def moved_seconds(share: Share, hardware: Hardware, software: Software) -> float:
    """Return the seconds in which FSDP gathers parameters and sums gradients in a step."""
    if share.ranks == 1:
        return 0.0

    def move(kind: str, width: int) -> float:
        """Unit by unit, through a buffer at both ends."""
        size = width * share.elements
        one = collective_time(kind, size / share.units, share.ranks, hardware, stride=share.stride)
        host = share.units * hardware.shard_s + share.parameters * hardware.shard_parameter_s
        return share.units * one + 2 * size / hardware.usable_bandwidth + host

    gathers = 2 * share.num_microbatches if share.zero == 3 else 1
    return gathers * move("all_gather", share.width) + move(
        "reduce_scatter", software.gradient_width
    )


def exposed_seconds(moved: float, compute: float, software: Software) -> float:
    """Return what of `moved` seconds a step is longer, as far as they hide behind its compute."""
    return beside(compute, moved, software) - compute


def optimizer_seconds(share: Share, hardware: Hardware, software: Software) -> float:
    """Return the seconds of norm, clipping and Adam."""
    num_bytes = software.optimizer_bytes * share.elements / share.ranks
    return num_bytes / hardware.usable_bandwidth + software.host_step_s


def summing_seconds(share: Share, hardware: Hardware, software: Software) -> float:
    """Return the seconds of adding up the gradients of all micro-batches, after the first."""
    num_bytes = software.gradient_bytes * share.elements * max(0.0, share.num_microbatches - 1)
    return num_bytes / hardware.usable_bandwidth
