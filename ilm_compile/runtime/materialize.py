"""Gives a stage its tensors, on this rank's device, and binds its graphs to this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ilm_compile.errors import ProgramError
from ilm_compile.program.bound import BoundCommunicator, bind_axes
from ilm_compile.program.lowered import Stage
from ilm_compile.program.program import Variable
from ilm_compile.runtime.compiled import RegionCompiler
from ilm_compile.runtime.direct import direct_calls
from ilm_compile.runtime.initial_values import InitialValues
from ilm_compile.runtime.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Binding:
    """What the graphs of this rank are bound to.

    axes: whom a call that names a mesh axis talks to. compiler: what compiles each graph, if any.
    """

    device: torch.device
    axes: Mapping[str, BoundCommunicator] = field(default_factory=dict)
    compiler: RegionCompiler | None = None

    def apply(self, module: nn.Module) -> None:
        """Bind every graph of `module`; what creates tensors from numbers alone gets the device."""
        for name, graph_module in module.named_modules():
            if not isinstance(graph_module, fx.GraphModule) or _calls_modules(graph_module):
                continue  # what calls regions has nothing to bind, and recompiles all it calls
            bind_axes(graph_module, self.axes)
            for node in graph_module.graph.nodes if self.device.type != "cpu" else ():
                if isinstance(node.target, torch._ops.OpOverload) and _creates(node.target):
                    node.kwargs = {**node.kwargs, "device": self.device}
            if self.compiler is not None and not name.endswith(".again"):
                compile_it = partial(self.compiler.code, name=name.removesuffix(".body"))
                own_class(graph_module).compile_code = staticmethod(compile_it)
            recompile(graph_module)


def fill(
    stage: Stage,
    names: Iterable[str],
    variables: Mapping[str, Variable],
    values: InitialValues,
    mesh: Mesh,
) -> None:
    """Replace the named meta tensors of `stage` by this rank's shards of their initial values.

    A tensor that several modules share stays shared. The user's own tensors are copied.
    """
    places = places_of(stage.module)
    for name in names:
        meta = resolve(stage, name)
        if not meta.is_meta:
            continue  # a constant of the graph brings its value along
        value = local_value(variables[name], values, mesh)
        if value.shape != meta.shape:
            raise ProgramError(
                f"materialize: stage {stage.index} expects {name} of shape {tuple(meta.shape)}, "
                f"the model gives {tuple(value.shape)} for the rank at {mesh.place}"
            )
        if isinstance(meta, nn.Parameter):
            value = nn.Parameter(value, requires_grad=meta.requires_grad)
        for module, attribute in places[id(meta)]:
            setattr(module, attribute, value)


def local_value(variable: Variable, values: InitialValues, mesh: Mesh) -> Tensor:
    """This rank's shard of the initial value of `variable`, in memory of its own."""
    part = values.shard(variable, mesh.place)
    return torch.empty(part.shape, dtype=part.dtype, device=mesh.device).copy_(part)


def finish(stage: Stage, binding: Binding) -> None:
    """Move constants to the device and bind the graphs. All must be filled."""
    for module, attribute, tensor in _tensors(stage.module):
        if tensor.is_meta:
            raise ProgramError(
                f"materialize: {attribute} of {type(module).__name__} in stage {stage.index} got "
                "no value; every tensor of a stage must be among its variables"
            )
        if tensor.device != binding.device:
            setattr(module, attribute, tensor.to(binding.device))
    binding.apply(stage.module)


def resolve(stage: Stage, name: str) -> Tensor:
    """The tensor that `stage` uses for variable `name`."""
    path, _, attribute = stage.variables[name].rpartition(".")
    tensor: Tensor = getattr(stage.module.get_submodule(path), attribute)
    return tensor


def graph_modules(module: nn.Module) -> list[fx.GraphModule]:
    """The fx graphs that `module` runs."""
    return [m for m in module.modules() if isinstance(m, fx.GraphModule)]


def recompile(graph_module: fx.GraphModule) -> None:
    """Make `graph_module` run its graph as it is now.

    `GraphModule.recompile` alone sends a module that FSDP has wrapped into endless recursion: it
    takes FSDP's class for the module's own, and puts the call wrapper there a second time.
    """
    wrapped = type(graph_module)
    own = graph_module.__class__ = own_class(graph_module)
    try:
        with direct_calls(graph_module.graph):
            graph_module.recompile()
    finally:
        graph_module.__class__ = wrapped
    if (compile_code := getattr(own, "compile_code", None)) is not None:
        own.forward = compile_code(graph_module, written=own.forward)
    own.written_code = own.forward


def own_class(graph_module: fx.GraphModule) -> Any:
    """The class that fx has made for `graph_module` alone, whose forward is its code."""
    return next(c for c in type(graph_module).__mro__ if "_wrapped_call" in vars(c))


def code_of(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """What runs the graph of `graph_module`, even while it runs the code of another."""
    own = own_class(graph_module)
    if "written_code" not in vars(own):
        own.written_code = own.forward
    code: Callable[..., Any] = own.written_code
    return code


def places_of(root: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each tensor is held, by its identity."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, attribute, tensor in _tensors(root):
        places.setdefault(id(tensor), []).append((module, attribute))
    return places


def _tensors(root: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, attribute, tensor)
        for module in root.modules()
        for table in (module._parameters, module._buffers)
        for attribute, tensor in table.items()
        if tensor is not None
    ]


def _calls_modules(graph_module: fx.GraphModule) -> bool:
    return bool(graph_module.graph.find_nodes(op="call_module"))


def _creates(op: torch._ops.OpOverload) -> bool:
    arguments = op._schema.arguments
    takes_tensor = any("Tensor" in str(argument.type) for argument in arguments)
    return not takes_tensor and any(argument.name == "device" for argument in arguments)
