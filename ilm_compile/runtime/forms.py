"""Programs of further batch shapes, run by the modules that hold the first one's parameters.

Two programs of one model differ in their graphs, not in what they own: the modules of each stage,
their parameters and whatever FSDP has made of them serve all shapes, and before a step they are
given the code of its shape. A shape is compiled when its first batch comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from ilm_compile.errors import PlanError
from ilm_compile.program.layout import Layout
from ilm_compile.program.lowered import LoweredProgram, Stage
from ilm_compile.program.program import Input, Lookup
from ilm_compile.runtime.data_parallel import GradientSync
from ilm_compile.runtime.executor import Executor
from ilm_compile.runtime.materialize import Binding, code_of, own_class, recompile
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.runtime.mode import set_training
from ilm_compile.runtime.p2p import Channel
from ilm_compile.runtime.step_inputs import StepInputs
from ilm_compile.schedule import Schedule

Dressed = list[tuple[fx.GraphModule, fx.GraphModule]]  # what runs, and whose code it runs


@dataclass(frozen=True, slots=True)
class Compiled:
    """A lowered program and the operations of one micro-batch, those computed twice included."""

    lowered: LoweredProgram
    model_flops: float | None = None
    hardware_flops: float | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """A further shape of one micro-batch: its inputs by name, and how its program is made."""

    inputs: dict[str, Input]
    compile: Callable[[], Compiled]


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """What running one shape takes on this rank.

    graphs: this rank's stages with the modules that hold its graphs, as they are written. FLOPs are
    of the global batch.
    """

    step_inputs: StepInputs
    executor: Executor
    graphs: list[Stage]
    lookups: tuple[Lookup, ...]
    output_names: tuple[str, ...]
    output_layouts: tuple[Layout, ...]
    output_widths: Mapping[str, int]
    model_flops: float | None
    hardware_flops: float | None
    dressed: Dressed

    def wear(self) -> None:
        """Give the modules that run the code of this shape."""
        for running, source in self.dressed:
            own_class(running).forward = code_of(source)


def make_form(
    compiled: Compiled,
    number: int,
    running: Sequence[Stage],
    schedule: Schedule,
    mesh: Mesh,
    syncs: Mapping[int, GradientSync],
    *,
    channel: Channel | None,
    binding: Binding,
    training: bool,
) -> Form:
    """What runs a program on the modules of `running`, which are this rank's of the first, 0.

    channel: that of the first. Raises `PlanError` if the two are not made alike.
    """
    lowered = compiled.lowered
    graphs = stages_of(lowered, schedule, mesh)
    dressed: Dressed = []
    modules = {stage.index: stage.module for stage in running}
    for first, other in zip(running, graphs, strict=True):
        if number and not training:
            set_training(other.module, False)
        dressed += dress(first, other, number, binding)
    step_inputs = StepInputs.of(
        lowered,
        graphs,
        num_microbatches=schedule.num_microbatches,
        dp=mesh.dp,
        device=mesh.device,
    )
    slices = step_inputs.layout.num_slices
    flops = (compiled.model_flops, compiled.hardware_flops)
    model_flops, hardware_flops = (None if n is None else n * slices for n in flops)
    stages = [replace(s, module=modules.get(s.index, s.module)) for s in lowered.stages]
    return Form(
        step_inputs=step_inputs,
        executor=Executor(stages, schedule, mesh, syncs, channel=channel),
        graphs=graphs,
        lookups=lowered.lookups,
        output_names=lowered.stages[-1].outputs[1:],  # without the loss
        output_layouts=lowered.output_layouts[1:],
        output_widths=lowered.output_widths,
        model_flops=model_flops,
        hardware_flops=hardware_flops,
        dressed=dressed,
    )


def stages_of(lowered: LoweredProgram, schedule: Schedule, mesh: Mesh) -> list[Stage]:
    """The stages that this rank runs."""
    return [s for s in lowered.stages if schedule.stage_to_rank[s.index] == mesh.pp.rank]


def dress(running: Stage, other: Stage, number: int, binding: Binding) -> Dressed:
    """Pairs of the graph modules of two stages; constants of the other are kept by the running one.

    Raises `PlanError` if they are not made alike.
    """
    if unlike := running.read_as.items() ^ other.read_as.items():
        raise _unlike(running, sorted({name for name, _ in unlike}))
    ours, theirs = (_graphs(stage.module) for stage in (running, other))
    if running.module is other.module:
        for module in ours.values():
            code_of(module)  # keeps it, before that of another shape runs
        return [(module, module) for module in ours.values()]
    if ours.keys() != theirs.keys():
        raise _unlike(running, sorted(ours.keys() ^ theirs.keys()))
    for name, source in theirs.items():
        for node in source.graph.find_nodes(op="get_attr"):
            value = _tensor(source, str(node.target))
            if not value.is_meta:
                node.target = f"_shape{number}_{str(node.target).replace('.', '_')}"
                for module in (ours[name], source):
                    module.register_buffer(node.target, value.to(binding.device), persistent=False)
                continue
            try:
                own = _tensor(ours[name], str(node.target))
            except AttributeError:
                raise _unlike(running, [f"{name}.{node.target}"]) from None
            if own.shape != value.shape:
                raise _unlike(running, [f"{name}.{node.target}"])
        recompile(source)
    binding.apply(other.module)
    return [(ours[name], theirs[name]) for name in ours]


def _graphs(module: nn.Module) -> dict[str, fx.GraphModule]:
    return {name: m for name, m in module.named_modules() if isinstance(m, fx.GraphModule)}


def _tensor(module: nn.Module, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), leaf)
    return value


def _unlike(stage: Stage, names: list[str]) -> PlanError:
    return PlanError(
        f"shapes: stage {stage.index} of the program of this shape is not made like that of the "
        f"first one, in {', '.join(names[:5])}; the model takes another way for it: compile a "
        "program of its own"
    )
