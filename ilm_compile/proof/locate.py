"""Where a program first goes wrong: the node at which its values part from those of another.

The other is the traced model, or the program before a pass. Nodes that stand in both graphs,
recognised by name, are compared as full tensors. A difference in values is reported at the first
node in order, a difference in gradients alone at the first one that the backward pass reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ilm_compile.program.collectives import redistribute
from ilm_compile.program.expert_rows import route
from ilm_compile.program.layout import layout_of
from ilm_compile.program.values import name_of
from ilm_compile.proof.numbers import (
    Parts,
    Run,
    Side,
    gather,
    relative_error,
    without_padding,
)

TINY = 1e-5  # of all gradients' norm: one that small may be zero in theory, and rounding in fact
FACTOR = 1e-8  # how well a wrong value must be a multiple of the right one to be called one


@dataclass(frozen=True, slots=True)
class Difference:
    """The first node whose value or gradient differs: by how much (relative), and how.

    `how` says what can be told of the wrong value. `beside` lists the nodes next to it that the
    traced graph does not have.
    """

    node: str
    where: str
    what: str
    error: float
    how: str = ""
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"the first {self.what} that differs is that of {self.where}, by {self.error:.1e}"
        text += f", {self.how}" if self.how else ""
        return text + (f"; next to it stands {', '.join(self.beside)}" if self.beside else "")


def first_difference(
    before: Side, after: Side, expected: Run, actual: Run, *, tolerance: float
) -> Difference | None:
    """Return where `after` first differs from `before`, given a run of each; None if nowhere."""
    old = {node.name: node for node in before.graph.graph.nodes if node.name in expected.seen}
    nodes = [
        n
        for n in after.graph.graph.nodes
        if name_of(n) in old and n.name in actual.seen and not layout_of(n).is_routed
    ]
    gradients = [grad for seen in expected.seen.values() for grad in seen.gradients[:1]]
    floor = TINY * _norm(gradients)
    for what, order in (("value", nodes), ("gradient", nodes[::-1])):
        for node in order:
            theirs, ours = expected.seen[name_of(node)], actual.seen[node.name]
            if what == "value":
                right, held = list(theirs.values), list(ours.values)
            else:
                right = [grad for grad in theirs.gradients if grad is not None]
                held = [grad for grad in ours.gradients if grad is not None]
                if len(right) < before.size or len(held) < after.size:
                    continue
            whole = gather(right, layout_of(old[name_of(node)]), before.sizes, what)[0]
            wholes = gather(held, layout_of(node), after.sizes, what)
            tiny = floor if what == "gradient" else 1e-12
            errors = [relative_error(each, whole, tiny) for each in wholes]
            if not max(errors) <= tolerance:
                near = node.all_input_nodes if what == "value" else list(node.users)
                return Difference(
                    node.name,
                    after.program.where(node),
                    what,
                    max(errors),
                    _how(wholes, errors, whole, tolerance),
                    tuple(_describe(n) for n in near if name_of(n) not in expected.seen),
                )
    return None


def _describe(node: fx.Node) -> str:
    is_typed = node.target in (redistribute, route)
    kind = f" {node.kwargs['src']} -> {node.kwargs['dst']}" if is_typed else ""
    return f"{node.name}{kind}"


def _norm(tensors: Sequence[Tensor | None]) -> float:
    norms = [tensor.norm().double() for tensor in tensors if tensor is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _how(wholes: Parts, errors: list[float], expected: Tensor, tolerance: float) -> str:
    """Return what can be told of wrong values: on which rank, of what shape, how many times."""
    worst = errors.index(max(errors))
    words = [f"on rank {worst} but not on all"] if min(errors) <= tolerance else []
    actual = without_padding(wholes[worst], expected)
    if actual.shape != expected.shape:
        words.append(f"it has shape {list(actual.shape)}, expected {list(expected.shape)}")
    elif expected.is_floating_point() and expected.numel() > 1:
        norm = expected.double().square().sum()
        factor = (actual.double() * expected.double()).sum() / norm
        if (actual.double() - factor * expected.double()).norm() < FACTOR * norm.sqrt():
            words.append(f"it is {float(factor):.6g} times what it should be")
    return ", ".join(words)
