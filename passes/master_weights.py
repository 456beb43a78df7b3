"""Float32 master weights: 16-bit parameters are held and updated in float32, cast where used.

An update of a bf16 weight by less than 1/256 of it is lost: at a learning rate of 1e-5 most weights
would never move. So what is trained is float32 at rest, in checkpoints too, and its gradient is
added up over micro-batches and ranks in float32. The model computes what it did: the cast gives
back the very weights that the user's model has.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import fx, nn

from ilm_compile.ops.precision import LOOKUP
from ilm_compile.ops.spec import spec_of
from ilm_compile.passes.base import Pass
from ilm_compile.program.attributes import put_tensor, tensor_at
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.layout import layout_of
from ilm_compile.program.program import Program, Variable
from ilm_compile.program.read_as import HEADS
from ilm_compile.rewrite.edit import create_cast

LOW = (torch.bfloat16, torch.float16)


def master_passes(program: Program) -> list[Pass]:
    """Return the pass that a model with 16-bit parameters needs beside the standard ones."""
    return [MasterWeights()] if any(map(is_low, program.variables.values())) else []


def is_master(program: Program, name: str, model: Variable) -> bool:
    """Whether `program` holds in float32 what is a 16-bit parameter of the `model`."""
    held = program.variables.get(name)
    return (
        "masters" in program.facts
        and is_low(model)
        and held is not None
        and held.dtype == torch.float32
    )


def is_low(variable: Variable) -> bool:
    """Whether `variable` is trained and has 16 bits."""
    return variable.is_parameter and variable.requires_grad and variable.dtype in LOW


@dataclass(frozen=True, kw_only=True)
class MasterWeights(Pass):
    """Hold trained bf16 and fp16 parameters in float32 and cast them where they are used.

    `partition` and `parallelize` add it for a model that has such parameters;
    ``disable={"master-weights"}`` trains them as they are. Preserves numerics bit for bit; the
    gradients are those of the 16-bit weights, widened.
    """

    name: ClassVar[str] = "master-weights"
    after: ClassVar[frozenset[str]] = frozenset({"sharded", "fused", "cast", "split", "placed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"masters"})

    def apply(self, program: Program) -> None:
        sources = [source for each in program.parameter_maps for source in each.sources]
        low = {name: v.dtype for name, v in program.variables.items() if is_low(v)}
        for node in program.graph.find_nodes(op="get_attr"):
            if (dtype := low.get(str(node.target))) is not None:
                _widen(program, node, dtype)
        for variable in (*program.variables.values(), *sources):
            if is_low(variable):
                variable.dtype = torch.float32
        dtypes = " and ".join(sorted(str(d).removeprefix("torch.") for d in set(low.values())))
        program.decisions.append(
            f"{self.name}: {len(low)} parameters in {dtypes} are held, updated and saved in "
            "float32, and cast where they are used"
        )


def _widen(program: Program, node: fx.Node, dtype: torch.dtype) -> None:
    held = tensor_at(program.graph_module, str(node.target)).detach().float()
    put_tensor(program.graph_module, str(node.target), nn.Parameter(held))
    node.meta["val"] = node.meta["val"].float()
    casts: dict[tuple[int, int | None], fx.Node] = {}
    for user in list(node.users):
        if user.op == "output" or user.target in HEADS:  # which cast while they work
            continue
        # Rows are rounded after they were looked up: the table is a model's largest weight.
        is_table = spec_of(user.target).precision is LOOKUP and user.args[0] is node
        whole = _whole(user) if is_table else []
        if whole:
            for rows in dict.fromkeys((user, *whole)):
                rows.meta["val"] = rows.meta["val"].float()
            for rows in whole:
                with program.graph.inserting_after(rows):
                    cast = create_cast(program, rows, dtype, near=rows)
                rows.replace_all_uses_with(cast, delete_user_cb=partial(operator.is_not, cast))
            continue
        # One for each region: what several share would be kept for a recompute, or sent.
        key = user.meta["region"], user.meta.get("stage")
        if key not in casts:
            with program.graph.inserting_before(user):
                casts[key] = create_cast(program, node, dtype, near=user)
        user.replace_input_with(node, casts[key])


def _whole(lookup: fx.Node) -> list[fx.Node]:
    """Return where what is looked up is whole and may be rounded; nothing if that is not known."""
    if not layout_of(lookup).is_partial:
        return [lookup]
    moved = list(lookup.users)
    return moved if all(node.target is redistribute for node in moved) else []
