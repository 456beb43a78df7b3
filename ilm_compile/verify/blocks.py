"""Whether the small model that a proof steps stands for the big one, block by block.

The types are checked on the program that would be launched, numbers on a small one. What ties the
two together: a block of the big program that the small one has too makes the same calls there,
wired the same, and every other block of the big program is, sizes and all, one of these again. So a
pass cannot do in the fortieth layer what no step has seen. Collectives are left to the types, since
the search may choose others in other blocks; and so are values that no gradient reaches, tables and
masks, which blocks share in any way. A sum that was fused with the norm of the next block is put
back into its own, since what is fused depends on where the stages begin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ilm_compile.errors import ProgramError
from ilm_compile.passes.fuse_residual import separated
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.dropout import seeded_dropout
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.placement import Placement
from ilm_compile.program.program import Program
from ilm_compile.program.values import tensors_of

aten = torch.ops.aten
CAST = aten.to.dtype
VIEWS = {
    *(aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default),
    *(aten.transpose.int, aten.permute.default, aten.contiguous.default, aten.slice.Tensor),
}
# What sharding makes of an op, depending on the placement it chose for it.
SAME = {
    "vocab_embedding": "embedding.default",
    "vocab_cross_entropy": "cross_entropy_loss.default",
    "partial_mean": "mean.dim",
}
Words = Callable[[fx.Node], str]


def check_blocks(program: Program, small: Program) -> None:
    """Raise `ProgramError` naming a region of `program` that `small` does not speak for."""
    program, small = separated(program), separated(small)
    stepped = _by_region(small, _wiring(small))
    ours = _by_region(program, _wiring(program))
    whole = _by_region(program, _everything(program))
    for name, text in ours.items():
        other = stepped.get(name, text)
        if text != other:
            _fail(name, "does not make the calls that it makes in the small model", text, other)
    known = {text: name for name, text in whole.items() if name in stepped}
    for name, text in whole.items():
        if name not in stepped and text not in known:
            like = min(known, key=lambda other: _distance(text, other), default="")
            _fail(name, "is like no block that took the step", text, like)


def placed_otherwise(program: Program, small: Program) -> list[str]:
    """Return the regions of `program` whose placements are those of no region of `small`.

    Where a collective stands, before or after a reshape, is left out: the search is free in it.
    """
    program, small = separated(program), separated(small)
    known = set(_by_region(small, _placements(small)).values())
    return [n for n, text in _by_region(program, _placements(program)).items() if text not in known]


def _fail(name: str, what: str, text: str, other: str) -> None:
    lines = zip((*text.splitlines(), "nothing"), (*other.splitlines(), "nothing"), strict=False)
    ours, theirs = next(((a, b) for a, b in lines if a != b), ("", ""))
    raise ProgramError(
        f"block check: {name} of the full-size program {what}: it has [{ours}] where [{theirs}] "
        "was stepped. A pass treats this block in its own way: verify a model that steps it"
    )


def _distance(text: str, other: str) -> int:
    return len(set(text.splitlines()) ^ set(other.splitlines()))


def _by_region(program: Program, words: Words) -> dict[str, str]:
    """Return the text of each region by name: a line per call, nothing for a call without words."""
    lines: dict[int, list[str]] = {}
    for node in program.calls():
        lines.setdefault(node.meta["region"], []).append(words(node))
    return {
        program.regions[index].name: "\n".join(filter(None, text)) for index, text in lines.items()
    }


def _wiring(program: Program) -> Words:
    """Words for the calls, without sizes and constants, and without collectives and casts."""
    places = _Places(program, {redistribute, CAST})
    return lambda node: " ".join([_name(node), *places.of_inputs(node)]) if node in places else ""


def _placements(program: Program) -> Words:
    """Words for the calls with the placements they have, and for collectives with their types."""
    places = _Places(program, {CAST, *VIEWS})

    def words(node: fx.Node) -> str:
        if node not in places:
            return ""
        if node.target is redistribute:
            types = (str(node.kwargs[key])[0] for key in ("src", "dst"))
            return f"{' -> '.join(types)} {' '.join(places.of_inputs(node))}"
        inputs = zip(places.of_inputs(node), map(_at, node.all_input_nodes), strict=True)
        return f"{_name(node)} {' '.join(map(' '.join, inputs))} -> {_at(node)}"

    return words


def _everything(program: Program) -> Words:
    """Words for the calls with shapes, dtypes and constants, without collectives and casts.

    Floats are left out: they may depend on the layer, a scale by its index, say. So does a
    dropout's salt.
    """
    places = _Places(program, {redistribute, CAST})

    def words(node: fx.Node) -> str:
        if node not in places:
            return ""
        constants: list[str] = []

        def visit(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                constants.append(places.of(argument, node))
            elif not isinstance(argument, float) and node.target is not seeded_dropout:
                constants.append(str(argument))
            return argument

        fx.node.map_aggregate((node.args, node.kwargs), visit)
        types = (f"{value.dtype}{list(value.shape)}" for value in tensors_of(node.meta["val"]))
        return f"{_name(node)}({', '.join(constants)}) {', '.join(types)}"

    return words


class _Places:
    """Where values come from, in words that are the same for repeats of a block.

    Knows the calls that a gradient reaches, but those that are to be seen through.
    """

    def __init__(self, program: Program, see_through: set[Any]) -> None:
        self.program, self.see_through = program, see_through
        self.with_gradient = gradient_nodes(program.graph)
        self.members: dict[int, list[fx.Node]] = {}
        for node in program.calls():
            if node in self.with_gradient and node.target not in see_through:
                self.members.setdefault(node.meta["region"], []).append(node)
        self.number = {n: i for nodes in self.members.values() for i, n in enumerate(nodes)}

    def __contains__(self, node: fx.Node) -> bool:
        return node in self.number

    def of_inputs(self, node: fx.Node) -> list[str]:
        """Return where the inputs of `node` come from, in order."""
        return [self.of(value, node) for value in node.all_input_nodes]

    def of(self, value: fx.Node, node: fx.Node) -> str:
        """Return where `value`, an input of `node`, comes from."""
        while value.target in self.see_through and value.op == "call_function":
            value = value.all_input_nodes[0]
        here = self.program.regions[node.meta["region"]]
        if value.op == "get_attr":
            return str(value.target).removeprefix(f"{here.name}.")
        if value not in self.number:
            return "shared"
        region = value.meta["region"]
        if region == node.meta["region"]:
            return str(self.number[value])
        # Counted from the end: what a block gives to the next one is made last.
        number = self.number[value] - len(self.members[region])
        there = self.program.regions[region]
        ago = node.meta["region"] - region
        return f"{number} of {f'{ago} blocks ago' if there.is_block else there.name}"


def _name(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return SAME.get(name, name)


def _at(node: fx.Node) -> str:
    placement: Placement | None = node.meta.get("placement")
    if placement is None:
        return "I"
    return f"S({placement.dim})" if placement.is_shard else placement.kind
