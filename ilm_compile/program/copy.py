"""An independent copy of a program, so that what a pass does can be compared with before."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule

from ilm_compile.program.program import Program


def copy_program(program: Program) -> Program:
    """Return a copy whose graph and tables are its own; meta tensors and constants are shared."""
    graph = fx.Graph()
    result = graph.graph_copy(program.graph, {})
    graph.output(result)
    old = program.graph.output_node().meta
    graph.output_node().meta = dict(old)
    root = _shared_copy(program.graph_module)
    return replace(
        program,
        graph_module=_LazyGraphModule(root, graph),
        variables={name: copy.copy(v) for name, v in program.variables.items()},
        inputs=dict(program.inputs),
        target_counts=dict(program.target_counts),
        output_widths=dict(program.output_widths),
        regions=list(program.regions),
        facts=set(program.facts),
        decisions=list(program.decisions),
        warnings=list(program.warnings),
        pass_log=list(program.pass_log),
        parameter_maps=list(program.parameter_maps),
    )


def _shared_copy(module: nn.Module) -> nn.Module:
    """Return a plain module of the same names that holds the same tensors."""
    shell = nn.Module()
    for name, parameter in module._parameters.items():
        shell.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        shell.register_buffer(
            name, buffer, persistent=name not in module._non_persistent_buffers_set
        )
    for name, child in module._modules.items():
        if child is not None:
            shell.add_module(name, _shared_copy(child))
    return shell
