"""Compiled regions whose products leave the gradients of their weights for W.

A compiled backward is one piece that returns gradients of inputs and nothing else. So the result of
such a product passes a *tap*: one more input of the region that adds nothing, whose gradient is
that of the result. What the weight's gradient takes beside it is one more output. Weights come in
detached, made outside by what leads to them (casts, placements), for W goes back through that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ilm_compile.program.input_graph import graph_of, reached
from ilm_compile.program.weight_parts import Product, left_by

Finish = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


def whole(lifted: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph whose products find the gradients of their weights themselves."""
    found = copy.deepcopy(lifted)
    for node in found.graph.nodes:
        if left := left_by(node.target):
            node.target = left[1]
    found.recompile()
    return found


class _Pass(torch.autograd.Function):
    """The result of a product; its gradient is also that of the tap."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, tap: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def pass_tap(result: Tensor, tap: Tensor) -> Tensor:
    """Return `result` as it is; whoever asks for the gradient of `tap` gets that of the result."""
    passed: Tensor = _Pass.apply(result, tap)  # type: ignore[no-untyped-call]
    return passed


class _Tap(torch.autograd.Function):
    """What has the shape of a result, takes no memory and is not read; its gradient is noted."""

    @staticmethod
    def forward(
        ctx: Any, always: Tensor, shape: torch.Size, note: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.note = note
        return always.expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None, None]:
        if grad is not None:
            ctx.note(grad)
        return None, None, None


class _Keep(torch.autograd.Function):
    """The results of a region as they are; before its backward, `kept` is put into `place`.

    Saved like everything for a backward, so that a recomputed region keeps it no longer.
    """

    @staticmethod
    def forward(ctx: Any, place: list[Tensor], count: int, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*given[:count])
        ctx.set_materialize_grads(False)
        ctx.place, ctx.count = place, count
        return tuple(x.view_as(x) for x in given[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.place[:] = [x.detach() for x in ctx.saved_tensors]
        return None, None, *[None] * ctx.count, *grads


@dataclass(frozen=True, slots=True)
class _Kept:
    """Stands for a tensor among what is kept."""

    place: int


@dataclass(frozen=True, slots=True)
class _Tapped:
    """A product, the shape and dtype of its result, and its arguments besides the weight."""

    product: Product
    shape: torch.Size
    dtype: torch.dtype
    value: Any
    others: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tap(self, weight: Tensor, kept: list[Tensor]) -> Tensor:
        """The tap whose gradient leaves that of `weight`; `kept` is full when it comes."""
        note = self.product.note(weight)

        def take(given: Any) -> Any:
            return kept[given.place] if isinstance(given, _Kept) else given

        def noted(grad: Tensor) -> None:
            kwargs = {name: take(given) for name, given in self.kwargs.items()}
            note(grad, take(self.value), *map(take, self.others), **kwargs)

        always = weight.new_empty((), dtype=self.dtype).requires_grad_()  # nobody reads it
        tap: Tensor = _Tap.apply(always, self.shape, noted)  # type: ignore[no-untyped-call]
        return tap


@dataclass(frozen=True, slots=True)
class TappedRegion:
    """A region with taps. What it takes and gives is as that of the region itself.

    weights: makes what its products multiply by, and whatever else is made of weights on the way.
    body: computes the rest, of the latter, the detached weights, the taps, and the `used` inputs.
    kept: the places of what weights' gradients take, among all inputs and then what `body` returns.
    """

    weights: fx.GraphModule
    body: fx.GraphModule
    taps: list[_Tapped]
    used: list[int]
    kept: list[int]
    num_results: int

    def open(self, given: Sequence[Tensor]) -> tuple[list[Tensor], Finish]:
        """What `body` takes, and what makes the results of the region of what it returns."""
        made, count = self.weights(*given), len(self.taps)
        kept: list[Tensor] = []
        detached = [weight.detach() for weight in made[:count]]
        taps = [tap.tap(w, kept) for tap, w in zip(self.taps, made[:count], strict=True)]

        def finish(returned: Sequence[Tensor]) -> tuple[Tensor, ...]:
            known, results = [*given, *returned], list(returned[: self.num_results])
            keep = [known[place].detach() for place in self.kept]
            tracked = [i for i, result in enumerate(results) if result.requires_grad]
            passed = _Keep.apply(kept, len(keep), *keep, *[results[i] for i in tracked])  # type: ignore[no-untyped-call]
            for i, result in zip(tracked, passed, strict=True):
                results[i] = result
            return tuple(results)

        return [*made[count:], *detached, *taps, *[given[i] for i in self.used]], finish


def tapped(lifted: fx.GraphModule, origins: dict[str, fx.Node]) -> TappedRegion | None:
    """The graph, all of whose inputs are given, with taps; None if no product leaves its weight.

    origins: by the name of a node the one of the region, which knows the shape of its result.
    """
    graph = copy.deepcopy(lifted).graph
    found = [(node, left) for node in graph.nodes if (left := left_by(node.target))]
    if not found:
        return None
    given = graph.find_nodes(op="placeholder")
    operands = [node.args[product.weight] for node, (product, _) in found]
    detached = _inputs(graph, given[0], "weight", len(found))
    for (node, (product, _)), weight in zip(found, detached, strict=True):
        node.update_arg(product.weight, weight)
    chain = {node for node in reached(operands) if node.op != "placeholder"}
    others = [n for n in graph.nodes if n in chain and not chain.issuperset(n.users)]
    weights = graph_of([n for n in graph.nodes if n in chain], given, [*operands, *others])
    for old, new in zip(others, _inputs(graph, detached[0], "made", len(others)), strict=True):
        old.replace_all_uses_with(new, lambda user: user not in chain)
    for node in reversed([n for n in graph.nodes if n in chain]):
        graph.erase_node(node)
    places: dict[fx.Node, int] = {}
    taps = [
        _tap(node, left, tap, places, origins[node.name].meta["val"])
        for (node, left), tap in zip(
            found, _inputs(graph, given[0], "tap", len(found)), strict=True
        )
    ]
    output = graph.output_node()
    results: list[fx.Node] = [*output.args[0]]  # type: ignore[misc]
    known = [*given, *results, *[n for n in places if n not in given and n not in results]]
    further = known[len(given) + len(results) :]
    with graph.inserting_before(output):
        ends = [graph.call_function(torch.ops.aten.detach.default, (node,)) for node in further]
    output.args = ((*results, *ends),)
    used = [i for i, node in enumerate(given) if node.users]
    for node in [node for node in given if not node.users]:
        graph.erase_node(node)
    body = fx.GraphModule(nn.Module(), graph)
    kept = [known.index(node) for node in places]
    return TappedRegion(weights, body, taps, used, kept, len(results))


def _tap(
    node: fx.Node,
    left: tuple[Product, Callable[..., Tensor]],
    tap: fx.Node,
    places: dict[fx.Node, int],
    result: Tensor,
) -> _Tapped:
    """Let the result of a product pass its tap; `places` numbers what is kept for it."""
    product, op = left
    node.target = op

    def kept(given: Any) -> Any:
        return _Kept(places.setdefault(given, len(places))) if isinstance(given, fx.Node) else given

    value, others = kept(node.args[product.value]), tuple(map(kept, product.others(node.args)))
    kwargs = {name: kept(given) for name, given in node.kwargs.items()}
    with node.graph.inserting_after(node):
        passed = node.graph.call_function(pass_tap, (node, tap))
    node.replace_all_uses_with(passed, lambda user: user is not passed)
    return _Tapped(product, result.shape, result.dtype, value, others, kwargs)


def _inputs(graph: fx.Graph, before: fx.Node, name: str, count: int) -> list[fx.Node]:
    with graph.inserting_before(before):
        return [graph.placeholder(f"{name}{i}") for i in range(count)]
