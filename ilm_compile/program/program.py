"""`Program`: one torch.fx graph of the whole training step's forward pass, and what is known of it.

The graph has one dialect (see `ilm_compile.program.trace`): placeholders are the user's inputs,
`get_attr` nodes are parameters and buffers under their original names, everything else is a
`call_function` of an ATen overload, an ``ilm`` op or a typed collective. The first output is the
loss. What passes learn is kept where it belongs: per node in ``node.meta``

* ``val``        FakeTensor, rank-local once the program is sharded
* ``layout``     `Layout`: its placement on every mesh axis (absent before sharding)
* ``source``     `Source`: module path and the user's file and line
* ``region``     index into `Program.regions`
* ``stage``      pipeline stage, or absent before the split
* ``leaves_weight``  set on a product whose weight gradient is left to W actions
* ``again``      set on what a block runs again in backward (`ilm_compile.program.remade`)

and per program in the fields below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from ilm_compile.errors import PlanError
from ilm_compile.program.kept_hooks import GradientHook
from ilm_compile.program.layout import INVARIANT, WEIGHT_AXES, Layout
from ilm_compile.program.parameter_map import ParameterMap
from ilm_compile.program.placement import Placement
from ilm_compile.program.plan import Plan


@dataclass(frozen=True, slots=True)
class Source:
    """Where a node comes from: the module that called it and the user's line of code."""

    module_path: str = ""
    location: str = ""  # "file.py:12"

    def __str__(self) -> str:
        return ", ".join(part for part in (self.module_path, self.location) if part) or "unknown"


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a micro-batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True)
class Variable:
    """A parameter or buffer of the user's model.

    `shape` is the full one. The last `padding` rows of dimension 0 are the compiler's: zeros that
    the user's model does not have.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    requires_grad: bool
    persistent: bool = True
    aliases: tuple[str, ...] = ()  # further names of the same tensor (tied weights)
    layout: Layout = INVARIANT
    padding: int = 0
    gradient_hooks: tuple[GradientHook, ...] = ()  # the user's

    @property
    def placement(self) -> Placement:
        """On the first axis of weights, tensor parallel; `layout` has all."""
        return self.layout.on(WEIGHT_AXES[0])

    @property
    def user_shape(self) -> tuple[int, ...]:
        """The shape in the user's model."""
        return (self.shape[0] - self.padding, *self.shape[1:]) if self.padding else self.shape

    def pad(self, value: Tensor) -> Tensor:
        """Return the user's `value` with the compiler's rows."""
        if not self.padding:
            return value
        rows = value.new_zeros((self.padding, *value.shape[1:]))
        return torch.cat([value, rows])

    def unpad(self, value: Tensor) -> Tensor:
        """Return a full `value` without the compiler's rows."""
        return value[: self.user_shape[0]] if self.padding else value


@dataclass(frozen=True, slots=True)
class FromInputs:
    """What `graph` makes of the `inputs` of a micro-batch alone."""

    graph: fx.GraphModule
    inputs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = [str(node.target) for node in self.graph.graph.find_nodes(op="placeholder")]
        object.__setattr__(self, "inputs", tuple(names))

    def of(self, batch: Mapping[str, Tensor], num_slices: int) -> list[Tensor]:
        """Return it of each micro-batch of `batch`, which has so many; on the CPU."""
        columns = [batch[name].cpu().chunk(num_slices) for name in self.inputs]
        return [self.graph.forward(*(column[m] for column in columns)) for m in range(num_slices)]


@dataclass(frozen=True, slots=True)
class Lookup(FromInputs):
    """Integers of a micro-batch that pick one of `size` rows or classes.

    ignored: the one that picks nothing. what, where: words for an error, such as "rows of
    embedding.weight".
    """

    size: int
    ignored: int | None
    what: str
    where: str


@dataclass(frozen=True, slots=True)
class Count(FromInputs):
    """What is added up over all micro-batches of the global batch before a step.

    Of one micro-batch it is a scalar or small. The program is given the sum times
    ``num_slices ** weight``, `num_slices` being the number of micro-batches.
    """

    weight: int = 0


@dataclass(frozen=True, slots=True)
class Region:
    """About a transformer block: the unit of FSDP, and of recompute if it is marked so.

    recompute: all of it runs again in backward. selective: what is cheap of it does.
    """

    name: str
    is_block: bool = False
    recompute: bool = False
    selective: bool = False


# Of a program: by stage and region, the bytes that one micro-batch keeps and makes again on a rank.
RegionBytes = Callable[["Program"], Mapping[tuple[int, int], tuple[int, int]]]


class Reasons(Protocol):
    """Knows why a parameter got its placement."""

    def explain(self, name: str) -> str:
        """Return the alternatives of parameter `name` and what they would have cost."""
        ...


@dataclass
class Program:
    """A traced model on its way to `lower`. Passes mutate it; see the module docstring."""

    graph_module: fx.GraphModule
    plan: Plan
    inputs: dict[str, Input]
    variables: dict[str, Variable]
    regions: list[Region]
    # By the placeholder that receives it (see `ilm_compile.program.loss`).
    target_counts: dict[str, Count]
    lookups: tuple[Lookup, ...] = ()
    output_names: tuple[str, ...] = ("loss",)
    # The last dimension of outputs that are wider in the program than the user's model gives them.
    output_widths: dict[str, int] = field(default_factory=dict)
    facts: set[str] = field(default_factory=set)  # what the passes that ran have ensured
    decisions: list[str] = field(default_factory=list)  # what was done and why, for explain()
    warnings: list[str] = field(default_factory=list)
    pass_log: list[str] = field(default_factory=list)
    parameter_maps: list[ParameterMap] = field(default_factory=list)  # of passes, in order
    initializer: Callable[..., Tensor] | None = None  # of parameters on the meta device
    # Traces the same model and loss with other inputs, and, by the path of a list of its modules,
    # with the first of these alone; the model must be what it was.
    retrace: Callable[..., Program] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # of the model, that are no tensors
    reasons: Reasons | None = None  # why parameters lie as they do, once sharded
    stage_ranks: tuple[int, ...] = ()  # the pipeline rank of each stage, once placed
    region_bytes: RegionBytes | None = None  # what a micro-batch keeps for its backward
    flops: int = 0  # of one micro-batch of the whole model, forward and backward, nothing twice
    recomputed_flops: int = 0  # of one micro-batch, what activation checkpointing computes twice

    @property
    def graph(self) -> fx.Graph:
        """The torch.fx graph."""
        return self.graph_module.graph

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The values the program returns, the loss first."""
        found: Any = self.graph.output_node().args[0]
        return tuple(found)

    def calls(self) -> Iterator[fx.Node]:
        """Yield the call_function nodes in order."""
        return (node for node in self.graph.nodes if node.op == "call_function")

    def parameters(self) -> dict[str, Variable]:
        """The trainable and frozen parameters by name, in the order of the user's model."""
        return {name: v for name, v in self.variables.items() if v.is_parameter}

    def axis_names(self) -> list[str]:
        """The mesh axes to speak of: those of more than one rank, or the first."""
        return [axis.name for axis in self.plan.mesh_axes] or [*self.plan.axes][:1]

    def rank_of(self, stage: int) -> int:
        """Return the pipeline rank that runs a stage."""
        return self.stage_ranks[stage] if self.stage_ranks else stage % self.plan.pp

    def source(self, node: fx.Node) -> Source:
        """Return where `node` comes from."""
        found: Source = node.meta.get("source", Source())
        return found

    def where(self, node: fx.Node) -> str:
        """Return the words an error or warning uses to point at `node`."""
        return f"node {node.name} ({self.source(node)})"

    def finish(self) -> None:
        """Clean up after a rewrite: check the graph, drop dead nodes; its code is made anew."""
        self.graph.eliminate_dead_code()
        self.graph_module.recompile()

    def dump(self) -> str:
        """Return the graph as Python text with shapes, placements and module paths."""
        from ilm_compile.program.dump import dump

        return dump(self)

    def explain(self, parameter: str | None = None) -> str:
        """Return what was done to the model and why, as text.

        Given the name of a `parameter`: what its placement could have been and what that would
        have cost. Raises `PlanError` for an unknown name, or if the program is not sharded.
        """
        from ilm_compile.program.explain import explain

        if parameter is None:
            return explain(self)
        if self.reasons is None:
            raise PlanError("explain: the program is not sharded, so no placement was chosen")
        return self.reasons.explain(parameter)
