"""Lowering: the last step, from one annotated graph to one module per pipeline stage.

Everything before works on the whole graph; this is the only place that cuts it. A value made in one
stage and used in a later one passes through every stage in between, so that each stage talks to its
neighbours only, and its gradient comes back the same way by itself.
"""

from __future__ import annotations

from itertools import groupby

from torch import fx

from ilm_compile.errors import ProgramError
from ilm_compile.passes.stage_module import Segment, build_stage
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.lowered import Boundary, LoweredProgram, Stage
from ilm_compile.program.placement import I
from ilm_compile.program.program import Program


def lower(program: Program) -> LoweredProgram:
    """Return the stages of `program`; one that was never split is one stage.

    Raises `ProgramError` if a node lies in no stage or before what it uses, or if a parameter
    that is used lands in no stage.
    """
    placed = _stages(program)
    num_stages = 1 + max(placed.values(), default=0)
    outputs: list[fx.Node] = list(program.graph.output_node().args[0])  # type: ignore[arg-type]
    crossing = [_crossing(placed, stage, num_stages) for stage in range(num_stages)]
    wanted = _wanted_gradients(program, outputs[0])
    boundaries = [
        tuple(_boundary(program, node, stage, placed, wanted) for node in nodes)
        for stage, nodes in enumerate(crossing)
    ]
    stages = []
    for index in range(num_stages):
        is_last = index == num_stages - 1
        results = outputs if is_last else crossing[index + 1]
        segments = _segments(program, placed, index, results)
        module, batch_inputs, variables = build_stage(program, segments, crossing[index], results)
        stages.append(
            Stage(
                index=index,
                module=module,
                batch_inputs=batch_inputs,
                received=boundaries[index],
                sent=() if is_last else boundaries[index + 1],
                outputs=program.output_names if is_last else (),
                variables=variables,
            )
        )
    lowered = LoweredProgram(
        plan=program.plan,
        inputs=program.inputs,
        variables=program.variables,
        target_counts=program.target_counts,
        stages=tuple(stages),
        output_placements=tuple(node.meta.get("placement", I) for node in outputs),
    )
    _check_variables(program, lowered)
    return lowered


def _stages(program: Program) -> dict[fx.Node, int]:
    """Return the stage of every call that is not a clone, in graph order."""
    is_split = any("stage" in node.meta for node in program.calls())
    placed: dict[fx.Node, int] = {}
    for node in program.calls():
        if node.meta.get("clone"):
            continue
        if is_split and "stage" not in node.meta:
            raise ProgramError(f"lower: {program.where(node)} is in no stage and is no clone")
        placed[node] = node.meta.get("stage", 0)
    for node, stage in placed.items():
        for source in node.all_input_nodes:
            if placed.get(source, 0) > stage:
                raise ProgramError(
                    f"lower: {program.where(node)} is in stage {stage}, before its input "
                    f"{source.name} in stage {placed[source]}; stages must follow the graph's order"
                )
    return placed


def _crossing(placed: dict[fx.Node, int], stage: int, num_stages: int) -> list[fx.Node]:
    """Return the values made before `stage` and used in it or later; the last stage has outputs."""
    return [
        node
        for node, made in placed.items()
        if made < stage and any(placed.get(user, num_stages - 1) >= stage for user in node.users)
    ]


def _segments(
    program: Program, placed: dict[fx.Node, int], stage: int, results: list[fx.Node]
) -> list[Segment]:
    """Return the clones that a stage needs as one segment, then its regions in order."""
    own = [node for node, index in placed.items() if index == stage]
    needed: set[fx.Node] = set()
    pending = [*results, *(source for node in own for source in node.all_input_nodes)]
    while pending:
        node = pending.pop()
        if node.meta.get("clone") and node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    segments = []
    if needed:
        clones = [node for node in program.calls() if node in needed]
        segments.append(Segment(name="shared", nodes=clones))
    for index, nodes in groupby(own, lambda node: node.meta["region"]):
        region = program.regions[index]
        segments.append(Segment(region.name, list(nodes), recompute=region.recompute))
    return segments


def _wanted_gradients(program: Program, loss: fx.Node) -> set[fx.Node]:
    """Return the nodes on a differentiable path from a trained parameter to the loss."""
    differentiable = gradient_nodes(program.graph)
    wanted: set[fx.Node] = set()
    pending = [loss]
    while pending:
        node = pending.pop()
        if node in differentiable and node not in wanted:
            wanted.add(node)
            pending += node.all_input_nodes
    return wanted


def _boundary(
    program: Program, node: fx.Node, stage: int, placed: dict[fx.Node, int], wanted: set[fx.Node]
) -> Boundary:
    """Describe `node` on its way into `stage`. A value that is only an output has no gradient."""
    val = node.meta["val"]
    if not val.is_floating_point():
        raise ProgramError(
            f"lower: {program.where(node)} has dtype {val.dtype} and would be sent to stage "
            f"{stage}; only floating-point values cross stages. Cut elsewhere"
        )
    is_loss = node is program.graph.output_node().args[0][0]  # type: ignore[index]
    later = any(user in wanted and placed.get(user, -1) >= stage for user in node.users)
    return Boundary(node.name, tuple(val.shape), val.dtype, node in wanted and (later or is_loss))


def _check_variables(program: Program, lowered: LoweredProgram) -> None:
    for node in program.graph.find_nodes(op="get_attr"):
        if node.users and not lowered.owners(str(node.target)):
            raise ProgramError(f"lower: {node.target} is used, but no stage holds it")
