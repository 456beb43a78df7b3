"""Which products leave the gradient of their weight for the weight part of a backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from ilm_compile.ops.products import operands
from ilm_compile.ops.spec import spec_of
from ilm_compile.passes.base import Pass
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.input_graph import reached
from ilm_compile.program.program import Program
from ilm_compile.program.step_traffic import keeps

_Place = tuple[Any, Any]


@dataclass(frozen=True, kw_only=True)
class SplitBackward(Pass):
    """Mark the products whose weight gradients a schedule's W actions can compute.

    Those are the products with an `OpSpec.weight_part` whose weight is made of
    trained parameters by ops that keep nothing for their backward (casts, views, placements), all
    in the region of the product: no other region and no recompute has a part in it. All other
    gradients of weights (norms, biases, a weight that several regions share) are found with those
    of the inputs. Preserves numerics bit for bit, but for a weight that is used twice in a region
    and not by products alone, whose gradients are added in another order.
    """

    name: ClassVar[str] = "split-backward"
    after: ClassVar[frozenset[str]] = frozenset({"sharded", "cast", "split"})
    ensures: ClassVar[frozenset[str]] = frozenset({"split-backward"})

    def apply(self, program: Program) -> None:
        chains = _Chains(program)
        products = [node for node in program.calls() if chains.is_trained_product(node)]
        marked = [node for node in products if chains.is_local(node)]
        for node in marked:
            node.meta["leaves_weight"] = True
        program.decisions.append(
            f"{self.name}: {len(marked)} of {len(products)} products of a weight leave the "
            "gradient of the weight to the W actions of the schedule"
        )


class _Chains:
    """The parameters that the weights of products are made of, and by which calls."""

    def __init__(self, program: Program) -> None:
        self._sizes = program.plan.axes
        self._gradients = gradient_nodes(program.graph)
        self._trained = {
            node
            for node in program.graph.find_nodes(op="get_attr")
            if node in self._gradients and program.variables[str(node.target)].is_parameter
        }
        self._users: dict[str, set[_Place]] = {}
        for node in program.graph.find_nodes(op="get_attr"):
            places = self._users.setdefault(str(node.target), set())
            places.update(map(_place, node.users))

    def is_trained_product(self, node: fx.Node) -> bool:
        """Whether `node` multiplies by something that is made of trained parameters alone."""
        product = spec_of(node.target).weight_part
        if product is None or len(node.args) <= max(product.weight, product.value):
            return False
        weight, value = node.args[product.weight], node.args[product.value]
        if not isinstance(weight, fx.Node) or not isinstance(value, fx.Node):
            return False
        chain = [*reached([weight])]
        return (
            weight.meta["val"].dim() == product.dims
            and weight in self._gradients
            and all(n.op != "placeholder" and not spec_of(n.target).weight_part for n in chain)
            and not self._trained.isdisjoint(chain)
        )

    def is_local(self, node: fx.Node) -> bool:
        """Whether nothing but the region of a product takes part in its weight."""
        (_, weight), own = operands(node), _place(node)
        return all(
            all(place == own for place in self._users[str(n.target)] if place[0] == own[0])
            if n.op == "get_attr"
            else _place(n) == own and not keeps(n, self._gradients, self._sizes)
            for n in reached([weight])
        )


def _place(node: fx.Node) -> _Place:
    return node.meta.get("stage"), node.meta.get("region")
