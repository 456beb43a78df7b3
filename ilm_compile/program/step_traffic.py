"""What a whole training step puts on the wire, predicted from the program alone.

A run counts the same (`Parallel.traffic`), and the two are equal to the byte. Not predicted, and
not counted: gradients summed over dp or between tied copies, and the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from ilm_compile.program.boundaries import stage_boundaries, stage_of
from ilm_compile.program.communicator import shape_communicators
from ilm_compile.program.gradients import gradient_nodes, wanted_gradients
from ilm_compile.program.layout import Sizes
from ilm_compile.program.lowered import Boundary
from ilm_compile.program.program import Program
from ilm_compile.program.ring_products import gather_products
from ilm_compile.program.traffic import Message, Traffic, traffic
from ilm_compile.program.values import map_tensors


def predicted_traffic(program: Program) -> tuple[dict[str, Traffic], ...]:
    """Return, for each pipeline rank, what one of its ranks sends per step, by kind.

    Kinds are those of the collectives, and "p2p" for messages between stages, whose calls are not
    counted. Raises `ProgramError` for a program that `lower` would refuse.
    """
    plan = program.plan
    steps: tuple[dict[str, Traffic], ...] = tuple({} for _ in range(plan.pp))
    stages = stage_of(program)
    for node, messages in collectives(program).items():
        for message in messages:
            sent = steps[program.rank_of(stages[node])].setdefault(message.kind, Traffic())
            sent.add(message.num_bytes * plan.num_microbatches, plan.num_microbatches)
    for step in steps:
        step["p2p"] = Traffic()
    for stage, boundaries in enumerate(stage_boundaries(program)):
        if stage == 0 or program.rank_of(stage - 1) == program.rank_of(stage):
            continue  # nothing is received, or handed over in memory
        values = [*boundaries.values()]
        gradients = [b for b in values if b.requires_grad]
        for rank, crossing in (
            (program.rank_of(stage - 1), values),
            (program.rank_of(stage), gradients),
        ):
            num_bytes = sum(map(_boundary_bytes, crossing)) * plan.num_microbatches
            steps[rank]["p2p"].add(num_bytes, calls=0)
    return steps


def collectives(program: Program) -> dict[fx.Node, list[Message]]:
    """Return what each call of `program` sends per micro-batch, for those that send anything.

    A block that is recomputed runs its collectives once more in backward.
    """
    wanted = wanted_gradients(program.graph)
    again = set(_run_again(program, wanted))
    found = {}
    for node in stage_of(program):
        # Tokens that are gathered for products need not be what is trained of them.
        moved = node.all_input_nodes[0] if node.target is gather_products else node
        messages = traffic(node, program.plan.axes, has_gradient=moved in wanted)
        if node in again:
            messages += [m._replace(backward=True) for m in messages if not m.backward]
        if messages:
            found[node] = messages
    return found


def _run_again(program: Program, wanted: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield the nodes that a backward computes once more.

    torch.utils.checkpoint stops as soon as it has what the backward needs, so what follows the last
    op that keeps a tensor is not run again: the final reduction of a transformer block, usually.
    """
    graph_gradients = gradient_nodes(program.graph)
    key = {n: (stage, n.meta["region"]) for n, stage in stage_of(program).items()}
    for (_, region), group in groupby(key, key.__getitem__):
        nodes = list(group)
        if not program.regions[region].recompute or wanted.isdisjoint(nodes):
            continue
        while nodes and not keeps(nodes[-1], graph_gradients, program.plan.axes):
            nodes.pop()
        yield from nodes


def keeps(node: fx.Node, gradients: set[fx.Node], sizes: Sizes) -> bool:
    """Whether autograd keeps a tensor for the backward of `node`; found out by running it."""
    if node not in gradients:
        return False
    kept: list[Tensor] = []

    def argument(source: fx.Node) -> Any:
        return map_tensors(
            lambda val: torch.empty(val.shape, dtype=val.dtype, device="meta").requires_grad_(
                source in gradients
            ),
            source.meta["val"],
        )

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    arguments: Any = fx.node.map_arg((node.args, node.kwargs), argument)
    # The program holds no call but ops and functions: the structural check sees to it.
    target: Any = node.target
    with (
        torch.enable_grad(),
        shape_communicators(sizes),
        saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        target(*arguments[0], **arguments[1])
    return bool(kept)


def _boundary_bytes(boundary: Boundary) -> int:
    return boundary.dtype.itemsize * torch.Size(boundary.shape).numel()
