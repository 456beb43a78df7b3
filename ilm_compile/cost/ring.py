"""The time of what is computed with pieces that travel round the ranks: attention whose keys and
values do (`program.ring_attention`), and products beside a collective (`program.ring_products`)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ilm_compile.cost.collectives import collective_time
from ilm_compile.cost.hardware import Hardware

MERGES = 3  # times that a rank's result is read or written when one more block is added to it
KERNELS = 6  # of adding a block
PASSES = 6  # over the scores of a block, where a mask has them written out
EXACT_BYTES = 4  # of a number of a result or a score


def pieces_time(
    products: float, piece: int, *, count: int, size: int, hardware: Hardware, sums: bool
) -> float:
    """Return the seconds of `count` products, cut in `size` pieces of which all but one travel.

    products: their seconds in one go, one kernel each. piece: bytes of what travels. A piece is
    multiplied while another one is under way; `sums`: what comes is added to what was made here.
    """
    work = products / size + (1 - 1 / size) * count * hardware.kernel_overhead_s
    work += hardware.kernel_overhead_s  # of the piece that is put, or added, where it belongs
    work += (3 if sums else 2) * piece / hardware.usable_bandwidth
    stride = 1 if size <= hardware.gpus_per_node else hardware.gpus_per_node
    hop = collective_time("p2p", piece, 2, hardware, stride=stride)
    return work + (size - 1) * max(work, hop)


def ring_time(
    compute: float,
    shapes: Sequence[Sequence[int]],
    *,
    itemsize: int,
    is_masked: bool,
    size: int,
    hardware: Hardware,
    backward: bool,
) -> float:
    """Return the seconds of one rank; messages count as far as its work does not hide them.

    compute: seconds of its attention in one piece. shapes: of the queries, keys and values that it
    holds. itemsize: bytes of a number of them. In backward the gradients of the keys travel too,
    and one step further: home.
    """
    q, k, v = shapes
    numbers = MERGES * size * prod(q[:-1]) * v[-1]
    if is_masked:
        numbers += (1 + backward) * PASSES * prod(q[:-1]) * k[-2] * size
    work = compute + numbers * EXACT_BYTES / hardware.usable_bandwidth
    work += size * KERNELS * hardware.kernel_overhead_s
    stride = 1 if size <= hardware.gpus_per_node else hardware.gpus_per_node
    hop = collective_time("p2p", (prod(k) + prod(v)) * itemsize, 2, hardware, stride=stride)
    late = max(0.0, (1 + backward) * hop - work / size)
    return work + (size - 1) * late + backward * hop
