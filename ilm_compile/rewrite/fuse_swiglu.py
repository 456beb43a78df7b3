"""Where a program computes silu(gate) * up, from two projections or from two parts of one."""

from __future__ import annotations

from torch import fx

from ilm_compile.program.dump import target_name
from ilm_compile.program.program import Program
from ilm_compile.rewrite.fusion import (
    Found,
    Left,
    args,
    aten,
    dtype,
    fuse,
    ilm,
    is_call,
    other_operand,
    shape,
)

OP = "swiglu"
ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default)  # of gated layers


def fuse_swiglus(program: Program) -> Found:
    """Replace products with a silu by `ilm::swiglu`."""
    fused: list[fx.Node] = []
    left: list[Left] = []
    for silu in [node for node in program.calls() if is_call(node, *ACTIVATIONS)]:
        products = [user for user in silu.users if is_call(user, aten.mul.Tensor)]
        if not products:
            continue  # no gate
        up = other_operand(products[0], silu)
        if reason := _refusal(silu, up):
            left.append(Left(OP, silu, reason))
            continue
        inputs = (args(silu)[0], up)
        fused.append(fuse(program, ilm.swiglu.default, inputs, products, point=products[0]))
    return Found(tuple(fused), tuple(left))


def _refusal(silu: fx.Node, up: object) -> str | None:
    if not is_call(silu, aten.silu.default):
        return f"its gate is {target_name(silu)}, the fused op's silu"
    if len(silu.users) > 1:
        return f"its silu is used {len(silu.users)} times"
    if not isinstance(up, fx.Node) or up is silu:
        return "its silu is multiplied by no other value"
    if shape(up) != shape(silu) or dtype(up) != dtype(silu):
        kinds = f"{list(shape(silu))} {dtype(silu)} and {list(shape(up))} {dtype(up)}"
        return f"gate and up are not alike: {kinds}"
    return None
