"""The time of one node on one device: the roofline.

A kernel takes the longer of its arithmetic and its memory traffic, plus a fixed overhead:
t = max(FLOPs / usable FLOP/s, bytes / usable bytes/s) + t0. The operands of a product take their
own time beside its arithmetic. The rates are those of `layer_time`. Kernels are those of the graph,
one per op: what a compiler fuses later is cheaper than said here. Collectives are python functions
and cost 0 here; see `ilm_compile.cost.collectives`.
"""

from __future__ import annotations

import torch
from torch import fx

from ilm_compile.cost.flops import backward_flops, forward_flops, slowest_rank
from ilm_compile.cost.hardware import Hardware
from ilm_compile.cost.layer_time import ATTENTION_BACKWARD
from ilm_compile.ops.nodes import is_view, op_name, value_bytes
from ilm_compile.ops.spec import spec_of
from ilm_compile.program.values import tensors_of


def node_bytes(node: fx.Node, *, dtype: torch.dtype | None = None) -> int:
    """Return the bytes `node` reads and writes; 0 for views and for what is no op.

    `dtype`: count floating-point values as if they were held in it.
    """
    if not op_name(node) or is_view(node):
        return 0
    written = value_bytes(node, dtype)
    read = {source: value_bytes(source, dtype) for source in node.all_input_nodes}
    if spec_of(node.target).reads_rows:
        table = node.all_input_nodes[0]
        read[table] = min(read[table], written)
    return written + sum(read.values())


def node_time(
    node: fx.Node,
    hardware: Hardware,
    *,
    shards: int = 1,
    dtype: torch.dtype | None = None,
    backward: bool = False,
) -> float:
    """Return the seconds of `node` on one device that does 1/`shards` of it; 0 for views.

    Where ranks have unequal shares already it is the device that has most.

    `dtype`: as if floating-point values were held in it; None: their own. `backward`: the seconds
    of the backward instead, which moves twice the bytes (it reads the gradient and what was saved,
    and writes a gradient per input). Raises `PlanError` for a dtype the hardware has no peak of.
    """
    num_bytes = node_bytes(node, dtype=dtype)
    if num_bytes == 0:
        return 0.0
    flops = (backward_flops(node) if backward else forward_flops(node)) * slowest_rank(node)
    traffic_s = (2 if backward else 1) * num_bytes / shards / hardware.usable_bandwidth
    compute_s = 0.0
    if flops:
        computed = dtype or tensors_of(node.meta["val"])[0].dtype
        if "attention" in op_name(node):
            again = ATTENTION_BACKWARD / 2 if backward else 1
            compute_s = again * flops / shards / hardware.attention_flops(computed)
        else:
            products = flops / max(1, forward_flops(node))
            compute_s = flops / shards / hardware.usable_flops(computed)
            compute_s += products * num_bytes / shards / hardware.operand_bandwidth
    return max(compute_s, traffic_s) + hardware.kernel_overhead_s
