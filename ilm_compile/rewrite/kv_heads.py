"""More tensor-parallel ranks than key-value heads: repeat the heads so that each rank has one.

With tp=8 and 4 key-value heads, each head is repeated twice, next to itself: the query heads that
rank r holds then find their key and value head on rank r. The repeated values are what HF's
`repeat_kv` makes, cut by the search to the part a rank needs; the gradient of a repeated head is
the sum over its copies. `share_heads` is the other way: heads that a model repeats itself.
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm

from torch import fx

from ilm_compile.errors import PlanError
from ilm_compile.ops.attention import HEAD_DIM, SDPA
from ilm_compile.ops.call import aten, tensor_inputs
from ilm_compile.program.layout import layout_of
from ilm_compile.program.program import Program
from ilm_compile.rewrite.edit import insert_before


def fit_heads(
    program: Program,
    axis: str,
    size: int,
    *,
    name: str,
    instead: str | None = None,
    pays: Callable[[fx.Node, int], bool] = lambda node, repeats: True,
) -> None:
    """Make every attention in `program` divisible by heads over `size` ranks of `axis`.

    name: the pass that wants it. An attention whose query heads `size` does not divide is left
    alone, or, where `instead` says what else can be done, refused with a `PlanError`. `pays`:
    whether its heads are worth so many repeats.
    """
    for node in list(program.calls()):
        if node.target not in HEAD_DIM or size == 1:
            continue
        dim = HEAD_DIM[node.target] % node.meta["val"].dim()
        query, key, value = tensor_inputs(node)[:3]
        heads, kv_heads = (int(n.meta["val"].shape[dim]) for n in (query, key))
        if heads % size:
            if instead is not None:
                usable = [n for n in range(1, heads + 1) if heads % n == 0]
                raise PlanError(
                    f"{name}: {axis}={size} does not divide the {heads} attention heads of "
                    f"{program.where(node)}; use one of {axis}={usable}{instead}"
                )
            continue
        repeats = lcm(kv_heads, size) // kv_heads
        if repeats > 1 and pays(node, repeats):
            copies = {v: _repeat(program, v, node, dim, repeats) for v in {key: 0, value: 0}}
            node.args = (query, copies[key], copies[value], *node.args[3:])
            program.decisions.append(
                f"{name}: each of the {kv_heads} key-value heads of "
                f"{program.source(node).module_path} is repeated {repeats} times for {axis}={size}"
            )


def share_heads(program: Program, name: str, *, masked: bool) -> None:
    """Have attention read key-value heads as they are where a model repeats them for its queries.

    For a pass, `name`: repeats need not be sent, and not be kept for a backward. masked: also where
    there is a mask, with which few kernels share heads.
    """
    shared = 0
    for node in [n for n in program.calls() if n.target is SDPA]:
        query, *values = tensor_inputs(node)
        found = [_repeated(value) for value in values[:2]]
        if None not in found and (masked or len(values) == 2):
            node.args = (query, *found, *node.args[3:])
            node.kwargs = {**node.kwargs, "enable_gqa": True}
            shared += 1
    if shared:
        program.decisions.append(
            f"{name}: {shared} attentions read their key-value heads before they are repeated"
        )
        program.graph.eliminate_dead_code()


def _repeated(value: fx.Node) -> fx.Node | None:
    """Return what `value` (batch, heads, tokens, head size) repeats, each head next to itself."""
    chain, layout = [], layout_of(value)
    for target in (aten.reshape.default, aten.expand.default, aten.unsqueeze.default):
        if value.target is not target or not isinstance(value.args[0], fx.Node):
            return None
        chain.append(tuple(value.meta["val"].shape))
        value = value.args[0]
    (merged, expanded, _), shape = chain, tuple(value.meta["val"].shape)
    if len(shape) != 4 or expanded != (*shape[:2], expanded[2], *shape[2:]):
        return None
    is_same = chain[2] == (*shape[:2], 1, *shape[2:])
    is_same = is_same and layout_of(value) == layout  # one head of all ranks is not each rank's own
    return value if is_same and merged == (shape[0], shape[1] * expanded[2], *shape[2:]) else None


def _repeat(program: Program, value: fx.Node, user: fx.Node, dim: int, repeats: int) -> fx.Node:
    shape = list(value.meta["val"].shape)
    expanded = [*shape[: dim + 1], repeats, *shape[dim + 1 :]]
    merged = [*shape[:dim], shape[dim] * repeats, *shape[dim + 1 :]]
    for target, argument in (
        (aten.unsqueeze.default, dim + 1),
        (aten.expand.default, expanded),
        (aten.reshape.default, merged),
    ):
        value = insert_before(program, user, target, value, argument)
    return value
