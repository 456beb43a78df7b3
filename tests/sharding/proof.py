"""The proof of a sharding rule: run the op on every rank and compare with the unsharded op.

Inputs are cut, copied or split into random partial sums as a strategy says; each rank, a thread,
runs the rank-local call; values and gradients are put together again as the placements say.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.ops.call import Call
from ilm_compile.ops.experts import COUNTS, GROUPED
from ilm_compile.ops.nodes import op_name
from ilm_compile.ops.strategy import global_call, localize, plain_placements
from ilm_compile.program.communicator import communicators
from ilm_compile.program.expert_rows import expert_order, sort_rows, unsort_rows
from ilm_compile.program.placement import Placement, S, join_shards, rows_of, split_shards
from ilm_compile.program.values import tensors_of
from ilm_compile.proof.threads import run_ranks
from ilm_compile.runtime.communicator import SingleCommunicator
from ilm_compile.sharding import Strategy, strategies
from tests.support.layouts import axis

# Inputs that an op gives no gradient: rotary tables.
WITHOUT_GRADIENT = {
    torch.ops.ilm.rotary.default: (2, 3),
    torch.ops.ilm.qkv_rotary.default: (1, 2),
}
# What only together keeps the order of rows of experts: proven in test_expert_rows.py.
AS_A_WHOLE = {
    *(expert_order, sort_rows, unsort_rows, *COUNTS, torch.ops.aten.cumsum.default),
}


def make_call(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: int
) -> tuple[Call, list[Tensor]]:
    """Return the call as the rules see it, and its tensor inputs."""
    graph = fx.Graph()
    tensors: list[Tensor] = []

    def lift(value: Any) -> Any:
        if isinstance(value, list):
            return [lift(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"input_{len(tensors)}")
        node.meta["val"] = value
        tensors.append(value)
        return node

    node = graph.call_function(
        target, tuple(map(lift, args)), {key: lift(value) for key, value in kwargs.items()}
    )
    with communicators(tp=SingleCommunicator()):  # of what talks: as one rank has it
        node.meta["val"] = target(*args, **kwargs)
    return global_call(node, axis(size)), tensors


def all_strategies(call: Call) -> list[Strategy]:
    """Return every strategy of the rule, segmented and folded outputs asked for too."""
    wanted = plain_placements(call.shape, call.size)
    for dim, n in enumerate(call.shape):
        for parts in (
            (n // 2, n - n // 2),
            (n // 4, n - n // 4),
            (n // 3, n // 3, n - 2 * (n // 3)),
        ):
            if S(dim, parts).divides(call.shape, call.size):
                wanted |= {S(dim, parts), S(dim, parts, folded=True)}
        wanted.add(S(dim, folded=True))
    return provable(call, strategies(call, wanted | {rows_of("T", S(0))}))


def provable(call: Call, found: list[Strategy]) -> list[Strategy]:
    """Return the strategies that a call alone can prove."""
    return [s for s in found if not (_is_proven_as_a_whole(call) and _has_rows(s))]


def _is_proven_as_a_whole(call: Call) -> bool:
    return call.target in AS_A_WHOLE or op_name(call.node) in GROUPED


def _has_rows(strategy: Strategy) -> bool:
    return any(p.kind in "TDEC" for p in (*strategy.inputs, strategy.output))


def _order(rows: int) -> Tensor:
    """Return the order in which rows of experts lie here, any but their own."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(rows))


def scatter(x: Tensor, placement: Placement, size: int) -> list[Tensor]:
    """Return what each rank holds of `x`: a shard, a copy, or a random share of the sum."""
    if placement.kind == "T":
        return [part.clone() for part in x[_order(len(x))].chunk(size)]
    if placement.is_shard:
        return [shard.clone() for shard in split_shards(x, placement, size)]
    if placement.kind != "P":
        return [x.clone() for _ in range(size)]
    share = torch.randn_like if x.is_floating_point() else partial(torch.randint_like, high=9)
    shares = [share(x) for _ in range(size - 1)]
    return [*shares, x - sum(shares)]


GRADIENT = {"I": "I", "P": "I", "R": "P", "S": "S"}  # what a gradient is, by its value's placement


def gather(parts: list[Tensor], placement: Placement) -> Iterator[Tensor]:
    """Yield the full value that each rank's part stands for."""
    if placement.kind == "T":
        joined = torch.cat(parts)
        yield joined[_order(len(joined)).argsort()]
    elif placement.is_shard:
        yield join_shards(parts, placement)
    elif placement.kind == "P":
        yield torch.stack(parts).sum(0)
    else:
        yield from parts


def gradient_placement(placement: Placement) -> Placement:
    return placement if placement.cuts else Placement(GRADIENT[placement.kind])


def run(node: fx.Node, call: Any, values: list[Tensor]) -> tuple[Tensor, ...]:
    """Run a call whose arguments are nodes on `values`, given in order; return its results."""
    target, args, kwargs = call
    remaining = iter(values)
    args, kwargs = fx.node.map_arg((args, kwargs), lambda _: next(remaining))
    return tensors_of(target(*args, **kwargs))


def prove(call: Call, tensors: list[Tensor], strategy: Strategy, *, bound: float = 1e-12) -> None:
    """Raise AssertionError unless `strategy` gives the unsharded value and gradients."""
    constant = WITHOUT_GRADIENT.get(call.target, ())
    floating = [i for i, t in enumerate(tensors) if t.is_floating_point() and i not in constant]
    full = [t.clone().requires_grad_(i in floating) for i, t in enumerate(tensors)]
    with communicators(tp=SingleCommunicator()):
        expected = run(call.node, (call.target, call.args, call.kwargs), full)
    trained = [value for value in expected if value.requires_grad]
    seeds = [torch.randn_like(value) for value in trained]
    if seeds:
        torch.autograd.backward(trained, seeds)
    shards = [scatter(t, p, call.size) for t, p in zip(tensors, strategy.inputs, strict=True)]
    seed_shards = [
        scatter(seed.double(), gradient_placement(strategy.output), call.size) for seed in seeds
    ]
    local_call = localize(call, strategy, "tp")

    def rank(r: int) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
        local = [s[r].requires_grad_(i in floating) for i, s in enumerate(shards)]
        values = run(call.node, local_call, local)
        if seed_shards:
            trained = [value for value in values if value.requires_grad]
            gradients = [s[r].to(v.dtype) for s, v in zip(seed_shards, trained, strict=True)]
            torch.autograd.backward(trained, gradients)
        return tuple(v.detach() for v in values), [local[i].grad for i in floating]

    results = run_ranks(call.size, rank)
    for index, whole in enumerate(expected):
        for value in gather([result[0][index] for result in results], strategy.output):
            torch.testing.assert_close(value, whole.detach(), rtol=bound, atol=bound)
    for position, i in enumerate(floating):
        parts = [result[1][position] for result in results]
        if full[i].grad is None:
            assert all(part is None for part in parts)
            continue
        for value in gather(parts, gradient_placement(strategy.inputs[i])):  # type: ignore[arg-type]
            torch.testing.assert_close(value, full[i].grad, rtol=bound, atol=bound)
