"""Lowering: the last step, from one annotated graph to one module per pipeline stage.

Everything before works on the whole graph; this is the only place that cuts it. What passes between
the stages is decided in `ilm_compile.program.boundaries`.
"""

from __future__ import annotations

from itertools import groupby

from torch import fx

from ilm_compile.errors import ProgramError
from ilm_compile.program.boundaries import stage_boundaries, stage_of
from ilm_compile.program.input_graph import reached
from ilm_compile.program.layout import TOKEN_AXES, layout_of, sharded_over
from ilm_compile.program.lowered import LoweredProgram, Stage
from ilm_compile.program.program import Program
from ilm_compile.program.read_as import read_as
from ilm_compile.rewrite.stage_module import Segment, build_stage


def lower(program: Program) -> LoweredProgram:
    """Return the stages of `program`; one that was never split is one stage.

    Raises `ProgramError` if a node lies in no stage or before what it uses, if a parameter that
    is used lands in no stage, or if the program was not sharded over a token axis of its plan.
    """
    _check_token_axes(program)
    placed = stage_of(program)
    received = stage_boundaries(program)
    cast_weights = read_as(program)
    outputs: list[fx.Node] = list(program.graph.output_node().args[0])  # type: ignore[arg-type]
    stages = []
    for index, boundaries in enumerate(received):
        sent = received[index + 1] if index + 1 < len(received) else None
        results = outputs if sent is None else list(sent)
        segments = _segments(program, placed, index, results)
        module, batch_inputs, variables = build_stage(program, segments, list(boundaries), results)
        stages.append(
            Stage(
                index=index,
                module=module,
                batch_inputs=batch_inputs,
                received=tuple(boundaries.values()),
                sent=() if sent is None else tuple(sent.values()),
                outputs=program.output_names if sent is None else (),
                variables=variables,
                read_as=cast_weights[index],
            )
        )
    lowered = LoweredProgram(
        plan=program.plan,
        inputs=program.inputs,
        variables=program.variables,
        target_counts=program.target_counts,
        stages=tuple(stages),
        output_layouts=tuple(map(layout_of, outputs)),
        output_widths=dict(program.output_widths),
        parameter_maps=tuple(program.parameter_maps),
        lookups=program.lookups,
    )
    _check_variables(program, lowered)
    return lowered


def _segments(
    program: Program, placed: dict[fx.Node, int], stage: int, results: list[fx.Node]
) -> list[Segment]:
    """Return the clones that a stage needs as one segment, then its regions in order."""
    own = [node for node, index in placed.items() if index == stage]
    used = [*results, *(source for node in own for source in node.all_input_nodes)]
    needed = set(reached(used, lambda n: n.all_input_nodes if n.meta.get("clone") else ()))
    clones = [node for node in program.calls() if node in needed and node.meta.get("clone")]
    segments = [Segment(name="shared", nodes=clones)] if clones else []
    for index, nodes in groupby(own, lambda node: node.meta["region"]):
        region = program.regions[index]
        segments.append(Segment(region.name, list(nodes), recompute=region.recompute))
    return segments


def _check_token_axes(program: Program) -> None:
    """Gradients are added up over a token axis: whole ones would be counted several times."""
    for axis in TOKEN_AXES:
        if program.plan.axes[axis] > 1 and sharded_over(axis) not in program.facts:
            raise ProgramError(
                f"lower: the plan has {axis}={program.plan.axes[axis]}, but no pass has sharded "
                f"the program over {axis}; run the pass that does, or take {axis}=1"
            )


def _check_variables(program: Program, lowered: LoweredProgram) -> None:
    for node in program.graph.find_nodes(op="get_attr"):
        if node.users and not lowered.owners(str(node.target)):
            raise ProgramError(f"lower: {node.target} is used, but no stage holds it")
