"""The time of a collective, and the bytes it puts on the wire.

``num_bytes`` is always the size of the full tensor: what an all-gather returns, what a
reduce-scatter and an all-reduce take on each rank, and for an all-to-all the tensor that the ranks
hold together. Formulas: ring algorithms, bytes as in NVIDIA/nccl-tests (doc/PERFORMANCE.md).
"""

from __future__ import annotations

from math import ceil, log2

from ilm_compile.cost.hardware import Hardware
from ilm_compile.errors import PlanError
from ilm_compile.program.traffic import SENT


def collective_bytes(kind: str, num_bytes: float, size: int) -> float:
    """Return the bytes that each of `size` ranks sends (for p2p: that the sender sends).

    Raises `PlanError` for an unknown kind, a size below 1, or a p2p between more than two ranks.
    """
    if kind not in SENT:
        raise PlanError(f"cost: unknown collective {kind!r}; known are {', '.join(SENT)}")
    if size < 1 or (kind == "p2p" and size > 2):
        expected = "1 or 2" if kind == "p2p" else "at least 1"
        raise PlanError(f"cost: {kind} among size={size} ranks; expected {expected}")
    return num_bytes * SENT[kind](size) if size > 1 else 0.0


def collective_time(
    kind: str, num_bytes: float, size: int, hardware: Hardware, *, stride: int = 1
) -> float:
    """Return the seconds of a collective of `num_bytes` (the full tensor) among `size` ranks.

    `stride` is the distance between neighbours of the group in global ranks: 1 if the group fills
    nodes, 8 if each member is on another node of 8. A group that spans nodes works in two levels,
    as NCCL does: inside each node, and between nodes on the share of one device. The two run at the
    same time on different pieces, so the slower one counts; between nodes the latency is that of a
    tree. (An all-reduce of 4 GiB on 32 H200 has a measured bus bandwidth of 365 GB/s; this formula
    gives 413.) Nothing is added for running beside compute. Raises `PlanError` as
    `collective_bytes` does.
    """
    if collective_bytes(kind, num_bytes, size) == 0:
        return 0.0
    inside = min(size, max(1, hardware.gpus_per_node // stride))
    nodes = ceil(size / inside)
    latency = transfer = 0.0
    if inside > 1:
        link = hardware.link(kind, inside)
        held = num_bytes / nodes if kind == "all_to_all" else num_bytes
        latency += link.latency_s
        transfer = link.transfer_s(collective_bytes(kind, held, inside))
    if nodes > 1:
        sent = collective_bytes(kind, num_bytes / inside, nodes)
        latency += hardware.network.latency_s * max(1.0, log2(nodes))
        transfer = max(transfer, hardware.network.transfer_s(sent))
    return latency + transfer
