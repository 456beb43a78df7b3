"""The sizes of a model, read off its traced graph: no config, no names of classes or modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod

from torch import fx

from ilm_compile.cost.sizes import ModelSizes
from ilm_compile.errors import PlanError
from ilm_compile.ops.nodes import op_name
from ilm_compile.ops.spec import spec_of
from ilm_compile.program.program import Program

# Where an attention op has its heads, and the ops that stand for attention written out.
HEADS = {
    "ilm::attention": 2,
    "aten::scaled_dot_product_attention": 1,
    "aten::softmax": 1,
    "aten::_softmax": 1,
}


def sizes_of(program: Program) -> ModelSizes:
    """Return the sizes of a program before any pass; of its blocks, those of the most common kind.

    Raises `PlanError` where a block has no attention that can be recognised, or no embedding.
    """
    blocks = [
        found
        for index, region in enumerate(program.regions)
        if region.is_block and (found := _block(program, index)) is not None
    ]
    if not blocks:
        raise PlanError(
            "search: found no block with attention in the model; expected one of "
            f"{', '.join(HEADS)} in a repeated block"
        )
    embedding = next((n for n in program.calls() if op_name(n) == "aten::embedding"), None)
    if embedding is None:
        raise PlanError("search: found no embedding in the model, whose rows are its vocabulary")
    table = program.variables[str(embedding.args[0].target)]  # type: ignore[union-attr]
    block = Counter(blocks).most_common(1)[0][0]
    vocab, hidden = table.user_shape
    return ModelSizes(
        hidden=hidden,
        layers=len(blocks),
        vocab=vocab,
        tied=_is_multiplied(program, table.name),
        **dict(block),
    )


def _is_multiplied(program: Program, name: str) -> bool:
    nodes = [n for n in program.graph.find_nodes(op="get_attr") if n.target == name]
    return any(spec_of(user.target).flops for node in nodes for user in node.users)


def _block(program: Program, index: int) -> tuple[tuple[str, int], ...] | None:
    """The sizes of one block, or None if it has no attention."""
    calls = [node for node in program.calls() if node.meta.get("region") == index]
    attention = next((n for n in calls if op_name(n) in HEADS and _has_heads(n)), None)
    if attention is None:
        return None
    heads = int(attention.args[0].meta["val"].shape[HEADS[op_name(attention)]])  # type: ignore[union-attr]
    within = set(calls)
    products = [node for node in calls if _weights(program, node)]
    if "softmax" in op_name(attention):  # values come in where the scores weigh them
        weighing = (n for n in calls if spec_of(n.target).flops and n not in products)
        attention = next(n for n in weighing if attention in set(_upstream(n, within)))
    before = set(_upstream(attention, within))
    projections = [node for node in products if node in before]
    after = [node for node in products if node not in before]
    output = next((n for n in after if attention in set(_upstream(n, within))), None)
    if not projections or output is None:
        return None
    (shape,) = _weights(program, output)
    hidden = int(output.meta["val"].shape[-1])
    head_dim = prod(shape) // hidden // heads
    columns = sum(prod(shape) // hidden for n in projections for shape in _weights(program, n))
    kv_heads = max(1, (columns // head_dim - heads) // 2)
    inside = [(n, shape) for n in after if n is not output for shape in _weights(program, n)]
    inside = [(n, shape) for n, shape in inside if hidden in shape]
    inside = [(n, shape) for n, shape in inside if len(shape) == 3] or inside  # experts alone
    if not inside:
        return None
    first, shape = inside[0]
    experts = shape[0] if len(shape) == 3 else 1
    widths = [prod(shape) // experts // hidden for _, shape in inside]
    ffn = min(widths)
    return (
        ("heads", heads),
        ("kv_heads", kv_heads if heads % kv_heads == 0 else heads),
        ("head_dim", 0 if head_dim * heads == hidden else head_dim),
        ("ffn", ffn),
        ("ffn_matrices", round(sum(widths) / ffn)),
        ("experts", experts),
        ("top_k", max(1, _rows(first) // _rows(output))),
    )


def _has_heads(node: fx.Node) -> bool:
    value = node.args[0]
    return isinstance(value, fx.Node) and value.meta["val"].ndim == 4


def _weights(program: Program, node: fx.Node) -> list[tuple[int, ...]]:
    """The shapes of the parameters that a product multiplies, through casts and views of them."""
    if (flops := spec_of(node.target).flops) is None:
        return []
    found = []
    for operand in flops.operands(node):
        while isinstance(operand, fx.Node) and operand.op == "call_function":
            inputs = operand.all_input_nodes
            operand = inputs[0] if len(inputs) == 1 else None
        if isinstance(operand, fx.Node) and operand.op == "get_attr":
            variable = program.variables.get(str(operand.target))
            if variable is not None and variable.is_parameter and len(variable.shape) >= 2:
                found.append(variable.shape)
    return found


def _upstream(node: fx.Node, within: set[fx.Node]) -> Iterator[fx.Node]:
    """The nodes of a block that a node follows from."""
    seen, queue = set(), [node]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source in within and source not in seen:
                seen.add(source)
                queue.append(source)
                yield source


def _rows(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel() // value.shape[-1])
