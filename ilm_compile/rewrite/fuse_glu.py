"""Where a program computes act(gate) * up, from two projections or from two parts of one."""

from __future__ import annotations

from typing import Any

from torch import fx

from ilm_compile.program.arguments import argument
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

OP = "glu"
# Of gated layers, by op and by what a gelu approximates; None: the fused op has no such one.
NAMES: dict[tuple[Any, str | None], str | None] = {
    (aten.silu.default, None): "silu",
    (aten.gelu.default, "none"): "gelu",
    (aten.gelu.default, "tanh"): "gelu_tanh",
    (aten.relu.default, None): None,
}
ACTIVATIONS = tuple({target for target, _ in NAMES})


def fuse_glus(program: Program) -> Found:
    """Replace products with a silu or a gelu by `ilm::glu`."""
    fused: list[fx.Node] = []
    left: list[Left] = []
    for act in [node for node in program.calls() if is_call(node, *ACTIVATIONS)]:
        products = [user for user in act.users if is_call(user, aten.mul.Tensor)]
        if not products:
            continue  # no gate
        up = other_operand(products[0], act)
        is_gelu = is_call(act, aten.gelu.default)
        name = NAMES[act.target, argument(act, "approximate") if is_gelu else None]
        if name is None:
            left.append(Left(OP, act, f"its gate is {target_name(act)}, the fused op has none"))
        elif reason := _refusal(act, up):
            left.append(Left(OP, act, reason))
        else:
            inputs = (args(act)[0], up, name)
            fused.append(fuse(program, ilm.glu.default, inputs, products, point=products[0]))
    return Found(tuple(fused), tuple(left))


def _refusal(act: fx.Node, up: object) -> str | None:
    name = target_name(act).removeprefix("aten.")
    if len(act.users) > 1:
        return f"its {name} is used {len(act.users)} times"
    if not isinstance(up, fx.Node) or up is act:
        return f"its {name} is multiplied by no other value"
    if shape(up) != shape(act) or dtype(up) != dtype(act):
        kinds = f"{list(shape(act))} {dtype(act)} and {list(shape(up))} {dtype(up)}"
        return f"gate and up are not alike: {kinds}"
    return None
