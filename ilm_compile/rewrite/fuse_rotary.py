"""Where a program turns queries and keys by rotary tables: `ilm::rotary`, `ilm::qkv_rotary`.

`ilm_compile.rewrite.rotation` reads single rotations. Two that follow each other with the same
tables are the queries and keys of one attention; where both, and the values, are parts of one
packed projection (InternLM2's wqkv), the op that splits it takes all of it.

Shapes in this file: q (batch, seq, heads, head_dim), k (batch, seq, kv_heads, head_dim).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any

from torch import fx

from ilm_compile.program.arguments import argument
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.program import Program
from ilm_compile.rewrite.edit import insert_after, insert_before
from ilm_compile.rewrite.fusion import (
    Found,
    Left,
    args,
    aten,
    comes_before_users,
    dtype,
    fuse,
    ilm,
    is_call,
    shape,
)
from ilm_compile.rewrite.rotation import Rotation, is_same, read_rotation

OP = "rotary"
CORES = (aten.cat.default, aten.stack.default)
ATTENTIONS = (ilm.attention.default, aten.scaled_dot_product_attention.default)
# Calls through which a value reaches an attention with the numbers of each head in their order.
CARRIERS = (
    *(aten.transpose.int, aten.unsqueeze.default, aten.expand.default, aten.reshape.default),
    *(aten.contiguous.default, aten.to.dtype, aten.clone.default),
)


@dataclass(frozen=True, slots=True)
class Packed:
    """A projection (batch, seq, kv_heads, q_per_kv + 2, head_dim), and the values cut out of it."""

    qkv: fx.Node
    values: fx.Node


def fuse_rotaries(program: Program) -> Found:
    """Replace pairs of rotations by one op each."""
    return _Search(program).run()


@dataclass
class _Search:
    program: Program
    fused: list[fx.Node] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    tables: dict[tuple[fx.Node, bool, bool], fx.Node] = field(default_factory=dict)

    def run(self) -> Found:
        with_gradient = gradient_nodes(self.program.graph)
        waiting: list[Rotation] = []
        for core in [n for n in self.program.calls() if is_call(n, *CORES)]:
            found = read_rotation(core)
            if isinstance(found, str):
                self.left.append(Left(OP, core, found))
            elif found is not None and not with_gradient.isdisjoint((found.cos, found.sin)):
                self.left.append(Left(OP, core, "its tables are trained, the op gives no gradient"))
            elif found is not None:
                waiting.append(found)
        while waiting:
            first, *waiting = waiting
            if waiting and _is_pair(first, waiting[0]):
                self._pair(first, waiting.pop(0))
            else:
                self._leave(first, "no second value is turned by the same tables next to it")
        return Found(tuple(self.fused), tuple(self.left))

    def _leave(self, rotation: Rotation, reason: str) -> None:
        self.left.append(Left(OP, rotation.result, reason))

    def _pair(self, q: Rotation, k: Rotation) -> None:
        if shape(q.x)[q.heads_dim] < shape(k.x)[k.heads_dim]:
            q, k = k, q
        tp, kv_heads = self.program.plan.tp, shape(k.x)[k.heads_dim]
        if kv_heads % tp:
            reason = f"tp={tp} does not divide its {kv_heads} key heads, and the op's q and k"
            return self._leave(q, f"{reason} are divided alike")
        was_interleaved = q.interleaved
        q, k, interleaved = _in_places(q, k)
        packed = _packed(q, k)
        results = [q.result, k.result, *([packed.values] if packed else [])]
        point = max(results)
        if packed and not comes_before_users(point, results):
            packed, results = None, results[:2]
            point = max(results)
        if not comes_before_users(point, results):
            return self._leave(q, "one of its results is used before the other is made")
        tables = [self._table(table, q) for table in (q.cos, q.sin)]
        turned = q.heads_dim == 1
        if packed:
            op: Any = ilm.qkv_rotary.default
            inputs = [packed.qkv]
        else:
            op = ilm.rotary.default
            inputs = [self._tokens_first(r.x, point) if turned else r.x for r in (q, k)]
        call = fuse(
            self.program,
            op,
            (*inputs, *tables, None, interleaved),
            results,
            point=point,
            turned=turned,
            unlike=() if interleaved == was_interleaved else (q.result, k.result),
        )
        self.fused.append(call)

    def _tokens_first(self, x: fx.Node, point: fx.Node) -> fx.Node:
        """Return x (batch, heads, seq, head_dim) as (batch, seq, heads, head_dim)."""
        if is_call(x, aten.transpose.int) and {d % 4 for d in args(x)[1:]} == {1, 2}:
            found: fx.Node = args(x)[0]
            return found
        return insert_before(self.program, point, aten.transpose.int, x, 1, 2)

    def _table(self, table: fx.Node, rotation: Rotation) -> fx.Node:
        """Return a table as the op takes it: (batch or 1, seq, pairs)."""
        kind = (rotation.is_doubled, rotation.interleaved)
        if (table, *kind) in self.tables:
            return self.tables[table, *kind]
        found = table
        if is_call(table, aten.unsqueeze.default) and args(table)[1] % 4 == rotation.heads_dim:
            found = args(table)[0]
        else:
            op = aten.squeeze.dim
            found = insert_after(self.program, table, op, table, rotation.heads_dim)
        key = (found, *kind)
        if rotation.is_doubled and key not in self.tables:
            width = shape(found)[-1]
            bounds = (0, width, 2) if rotation.interleaved else (0, width // 2)
            half = insert_after(self.program, found, aten.slice.Tensor, found, 2, *bounds)
            self.tables[key] = half
        result = self.tables.get(key, found)
        self.tables[table, *kind] = result
        return result


def _is_pair(q: Rotation, k: Rotation) -> bool:
    """Whether two rotations can be one op: the same tables, tokens, head size, dtype and region."""

    def kind(r: Rotation) -> tuple[Any, ...]:
        batch, *_, head_dim = shape(r.x)
        region, stage = r.result.meta["region"], r.result.meta.get("stage")
        size = (batch, shape(r.x)[3 - r.heads_dim], head_dim, dtype(r.x))
        return (r.heads_dim, r.is_doubled, r.interleaved, size, region, stage)

    alike = kind(q) == kind(k) and is_same(q.cos, k.cos) and is_same(q.sin, k.sin)
    return alike and q.result is not k.result


def _in_places(q: Rotation, k: Rotation) -> tuple[Rotation, Rotation, bool]:
    """Leave sorting out where it changes no score: both sorted, and used by one attention alone.

    Scores are sums over the numbers of a head, and q and k are sorted alike.
    """
    if q.unsorted is None or k.unsorted is None or q.interleaved:
        return q, k, q.interleaved
    uses = [_attention_uses(r.result) for r in (q, k)]
    if uses[0] is None or uses[1] is None:
        return q, k, False
    attentions = {node for node, _ in uses[0]}
    pairs_up = uses[0] == {(n, 0) for n in attentions} and uses[1] == {(n, 1) for n in attentions}
    if not pairs_up:
        return q, k, False
    return changed(q, x=q.unsorted), changed(k, x=k.unsorted), True


def _attention_uses(node: fx.Node) -> set[tuple[fx.Node, int]] | None:
    """Return the attentions that read `node`, and as which argument; None if others read it."""
    found: set[tuple[fx.Node, int]] = set()
    for user in node.users:
        if is_call(user, *ATTENTIONS):
            found |= {(user, index) for index, arg in enumerate(args(user)) if arg is node}
        elif is_call(user, *CARRIERS) and shape(user)[-1] == shape(node)[-1]:
            further = _attention_uses(user)
            if further is None:
                return None
            found |= further
        else:
            return None
    return found


def _packed(q: Rotation, k: Rotation) -> Packed | None:
    """Return the packed projection that q and k are cut out of, if they are."""
    heads, key = q.x, k.x
    if q.heads_dim != 2 or not is_call(heads, aten.reshape.default):
        return None
    queries = args(heads)[0]
    if not is_call(queries, aten.slice.Tensor) or not is_call(key, aten.select.int):
        return None
    qkv = args(queries)[0]
    if args(key)[0] is not qkv or len(shape(qkv)) != 5 or not _is_at(key, shape(qkv)[3] - 2):
        return None
    bounds = tuple(argument(queries, name) for name in ("start", "end", "step"))
    picked = range(*slice(*bounds).indices(shape(qkv)[3]))
    if argument(queries, "dim") % 5 != 3 or picked != range(shape(qkv)[3] - 2):
        return None
    groups, q_per_kv, head_dim = shape(queries)[2:]
    if shape(heads)[2:] != (groups * q_per_kv, head_dim):
        return None
    selected = [user for user in qkv.users if is_call(user, aten.select.int)]
    values = [user for user in selected if _is_at(user, shape(qkv)[3] - 1)]
    return Packed(qkv, values[0]) if len(values) == 1 else None


def _is_at(select: fx.Node, index: int) -> bool:
    """Whether `select` picks `index` of dimension 3 of 5."""
    size = shape(args(select)[0])[3]
    return bool(args(select)[1] % 5 == 3 and args(select)[2] % size == index)
