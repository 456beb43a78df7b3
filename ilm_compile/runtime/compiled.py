"""torch.compile of each region: one function for all that compute alike, their tensors its inputs.

A region keeps its module, its parameters and what FSDP and recomputation do around it; only the
code that it runs is another. What cannot be compiled runs as it is written, and says so.
"""

from __future__ import annotations

import copy
import logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ilm_compile.program.dropout import SALT, seeded_dropout
from ilm_compile.program.functions import FUNCTIONS
from ilm_compile.program.program import Source
from ilm_compile.program.remade import NOTES
from ilm_compile.program.weight_parts import is_collecting, left_by
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.runtime.static_parts import Part, in_turn, parts_of
from ilm_compile.runtime.weight_taps import tapped, whole

LOGGER = logging.getLogger("ilm_compile.compile")
INDUCTOR = "inductor"
# The random numbers of eager torch. And no order of its own for collectives that are independent
# of each other: a rank that keeps another part of a value could find another order.
_OPTIONS = {"fallback_random": True, "reorder_for_peak_memory": False}
IN_PARTS = (
    "for rows of experts cut it in parts, and what selective recompute keeps of it belongs to the "
    "whole; take checkpoint=True or False"
)

Backend = Callable[[Any, list[Any]], Any]
Code = Callable[..., Any]
_Run = Callable[[list[Tensor], Callable[[], Any]], Any]  # of all inputs, and what runs as written
_ONE_AT_A_TIME = threading.RLock()  # of the threads of a proof: torch has but one tracing


@dataclass(slots=True, eq=False)
class Compilation:
    """One function, which all `regions` run that compute alike.

    times: it was compiled: once for training, once more without gradients. seconds: all that took.
    problem: why it runs as it is written, if it does.
    """

    written: fx.GraphModule | None = field(repr=False, default=None)  # all that it uses is given
    runs: dict[object, Code] = field(repr=False, default_factory=dict)  # by what it is given
    regions: list[str] = field(default_factory=list)
    times: int = 0
    seconds: float = 0.0
    problem: str = ""

    def __str__(self) -> str:
        first, last = self.regions[0], self.regions[-1]
        name = first if first == last else f"{first} ... {last} ({len(self.regions)} alike)"
        if self.problem:
            return f"{name}: runs as written, {self.problem}"
        if not self.times:
            return f"{name}: not run yet"
        return f"{name}: compiled in {self.seconds:.1f} s"


class RegionCompiler:
    """Gives graphs their compiled code. Each is compiled by the first of its regions that runs.

    The graphs go to the backend as they are: there is no Python to be traced, and nothing to guard
    in each call but what has a gradient and how inputs lie in memory. backend: of torch.compile, by
    name. `compilations`: what was met so far.
    """

    def __init__(self, backend: str) -> None:
        self._backend = _find(backend)
        self._known: dict[object, Compilation] = {}

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        return tuple(self._known.values())

    def code(self, graph_module: fx.GraphModule, name: str, written: Code) -> Code:
        """What runs the graph instead of `written`, both as methods: the module comes first."""
        graph = graph_module.graph
        if not _is_traceable(graph):
            return written
        lifted, names, salts, origins = _lift(graph_module)
        parts = parts_of(lifted, origins)
        if parts is None:
            run = self._runner(lifted, name, origins)
        elif any(node.target in NOTES for node in graph.nodes):
            self._note(IN_PARTS, name)
            return written
        else:
            run = self._in_parts(lifted, parts, name, origins)

        def forward(module: nn.Module, *inputs: Tensor) -> Any:
            held = [getattr(module, name) for name in names]
            return run([*held, *salts, *inputs], lambda: written(module, *inputs))

        return forward

    def _in_parts(
        self, lifted: fx.GraphModule, parts: list[Part], name: str, origins: dict[str, fx.Node]
    ) -> _Run:
        """What runs the parts of a region, those of them compiled that can be."""
        count = sum(part.is_static for part in parts)
        runs: list[Code] = []
        for part in parts:
            run = part.graph_module.forward
            if part.is_static:
                number = 1 + sum(part.is_static for part in parts[: len(runs)])
                compiled = self._runner(
                    part.graph_module, f"{name} (part {number} of {count})", origins
                )
                run = _called(compiled, run)
            runs.append(run)
        whole = in_turn(lifted, parts, runs).forward
        return lambda given, written: whole(*given)

    def _runner(self, lifted: fx.GraphModule, name: str, origins: dict[str, fx.Node]) -> _Run:
        """What runs a graph, all of whose inputs are given; `written` is asked if that fails."""
        leaving = tapped(lifted, origins)
        key = lifted.code, *_types(lifted, origins)
        found = self._known.setdefault(key, Compilation(whole(lifted)))
        if name not in found.regions:
            found.regions.append(name)

        def run(given: list[Tensor], written: Callable[[], Any]) -> Any:
            if found.problem:
                return written()
            leaves = leaving is not None and is_collecting()
            kind = (
                leaves,
                torch.is_grad_enabled(),
                *[(x.requires_grad, x.stride()) for x in given],
            )
            code = found.runs.get(kind)
            if leaving is None or not leaves:
                if code is None:
                    code = self._compile(found, kind, found.written, given, origins)
                return written() if code is None else code(*given)
            taken, finish = leaving.open(given)
            if code is None:
                code = self._compile(found, kind, leaving.body, taken, origins)
            return written() if code is None else finish(code(*taken))

        return run

    def _note(self, problem: str, name: str) -> None:
        """Note a region that is not even tried, and warn of the first with this problem."""
        found = self._known.setdefault(problem, Compilation(problem=problem))
        if name not in found.regions:
            found.regions.append(name)
        if len(found.regions) == 1:
            warnings.warn(f"compile: {found}", stacklevel=2)

    def _compile(
        self,
        found: Compilation,
        kind: object,
        graph_module: fx.GraphModule | None,
        given: list[Tensor],
        origins: dict[str, fx.Node],
    ) -> Code | None:
        """What runs `graph_module`, of `found`, on what is like `given`; None if nothing can."""
        start = time.perf_counter()
        try:
            with _ONE_AT_A_TIME, _backward_at_once():
                run: Code = self._backend(copy.deepcopy(graph_module), given)
        except Exception as error:  # of whatever kind: nothing of it has run
            found.problem = _reason(error, origins)
            warnings.warn(f"compile: {found}", stacklevel=3)
            return None
        found.runs[kind] = run
        found.times += 1
        found.seconds += time.perf_counter() - start
        LOGGER.info("compile: %s", found)
        return run


def compiler_for(wanted: bool | str, mesh: Mesh) -> RegionCompiler | None:
    """What compiles the regions of a plan with ``compile=wanted``; None for those that stay.

    Warns where this machine lacks what it takes. Raises `PlanError` unless all ranks can or none.
    """
    if not wanted:
        return None
    backend = INDUCTOR if wanted is True else wanted
    lack = missing_for(backend, mesh.device)
    mesh.check_alike({"what torch.compile has here": lack or backend})
    if not lack:
        return RegionCompiler(backend)
    if mesh.rank == 0:
        warnings.warn(f"compile: {lack}; all regions run as they are written", stacklevel=4)
    return None


def missing_for(backend: str, device: torch.device) -> str:
    """What this machine lacks for `backend`, "" if nothing."""
    if backend != INDUCTOR:
        return ""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Inductor needs triton for CUDA, and it cannot be used here"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"Inductor needs a C++ compiler for the CPU: {lines[0]}"
    return ""


def _find(name: str) -> Backend:
    if name == INDUCTOR:
        from ilm_compile.runtime.graph_passes import OPTION, GraphPasses  # it imports Inductor

        options = {**_OPTIONS, OPTION: GraphPasses()}
        return lambda graph, inputs: torch._inductor.compile(graph, inputs, options=options)
    from torch._dynamo.backends.registry import lookup_backend

    found: Backend = lookup_backend(name)
    return found


def _backward_at_once() -> AbstractContextManager[object]:
    """The backward is compiled with the forward, so that what fails fails before anything runs."""
    from torch._functorch import config

    name = "force_non_lazy_backward_lowering"
    return config.patch(name, True) if hasattr(config, name) else nullcontext()


def _is_traceable(graph: fx.Graph) -> bool:
    """Whether all that it calls is ops and the functions of programs."""
    return all(
        node.op != "call_module"
        and (
            node.op != "call_function"
            or isinstance(node.target, torch._ops.OpOverload)
            or node.target in FUNCTIONS
            or node.target in NOTES
            or left_by(node.target) is not None
        )
        for node in graph.nodes
    )


def _lift(
    graph_module: fx.GraphModule,
) -> tuple[fx.GraphModule, list[str], list[Tensor], dict[str, fx.Node]]:
    """The graph with all that may differ between equal regions as its first inputs.

    Those are the tensors that the module holds, given by their names, and the salts of its
    dropouts. Last comes whence each node is. Everything is named by its place.
    """
    graph, values, origins = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, fx.Node]()
    attributes: dict[str, fx.Node] = {}
    own = graph_module.graph
    held = [node for node in own.nodes if node.op == "get_attr"]
    for node in held:
        path = str(node.target)
        if path not in attributes:
            attributes[path] = graph.placeholder(f"held{len(attributes)}")
            origins[attributes[path].name] = node
        values[node] = attributes[path]
    dropouts = own.find_nodes(op="call_function", target=seeded_dropout)
    salts = {node: graph.placeholder(f"salt{number}") for number, node in enumerate(dropouts)}
    for place, node in enumerate(own.nodes):
        if node.op == "placeholder":
            values[node] = graph.placeholder(f"given{place}")
            origins[values[node].name] = node
        elif node.op == "call_function" and node.target not in NOTES:
            args, kwargs = (
                fx.node.map_arg(each, values.__getitem__) for each in (node.args, node.kwargs)
            )
            if node in salts:
                args = (*args[:SALT], salts[node], *args[SALT + 1 :])
            name = f"v{place}"
            values[node] = graph.create_node("call_function", node.target, args, kwargs, name)
            origins[name] = node
        elif node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], values.__getitem__))
    numbers = [torch.tensor(node.args[SALT]) for node in dropouts]
    return fx.GraphModule(nn.Module(), graph), list(attributes), numbers, origins


def _types(lifted: fx.GraphModule, origins: dict[str, fx.Node]) -> Iterator[object]:
    """What of its inputs decides how a graph is compiled; all salts are alike."""
    for node in lifted.graph.find_nodes(op="placeholder"):
        if (origin := origins.get(node.name)) is not None:
            val, owner = origin.meta["val"], origin.graph.owning_module
            is_held = origin.op == "get_attr"
            yield (
                *(tuple(val.shape), val.dtype),
                is_held and bool(getattr(owner, str(origin.target)).requires_grad),
            )


def _called(run: _Run, written: Code) -> Code:
    """`run` as a graph calls it."""

    def part(*given: Tensor) -> Any:
        return run(list(given), lambda: written(*given))

    return part


def _reason(error: Exception, origins: dict[str, fx.Node]) -> str:
    """One sentence of what torch says, with the user's line that it is about."""
    text = str(error)
    said = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    calls = [origins[name] for name in re.findall(r"%(v\d+) : ", text) if name in origins]
    where = ""
    if calls:
        where = f" at node {calls[-1].name} ({calls[-1].meta.get('source', Source())})"
    return f"torch.compile cannot take it{where}: {said}"
