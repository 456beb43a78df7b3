"""A small model and its lowered program, written by hand: the runtime under test needs no compiler.

The model has what is hard for a runtime: a tied embedding, a fused weight of two segments, sharded
and invariant parameters, a frozen and an unused one, a buffer, a value relayed without gradient,
and outputs beside the loss.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ilm_compile.program.collectives import redistribute
from ilm_compile.program.layout import INVARIANT
from ilm_compile.program.lowered import Boundary, LoweredProgram, Stage
from ilm_compile.program.placement import I, Placement, S
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Count, Input, Variable
from ilm_compile.runtime import Mesh, Parallel
from ilm_compile.schedule import build, check
from tests.support import layouts

VOCAB, HIDDEN, FFN, SEQ, ROWS, NUM_BLOCKS = 10, 6, 8, 5, 2, 4
fx.wrap("redistribute")
META: dict[str, Any] = {"device": "meta", "dtype": torch.float64}
PLACEMENTS: dict[str, Placement] = {"gate_up": S(0, (FFN, FFN)), "down": S(1)}


class Block(nn.Module):
    """x + down(tanh(gate) * up), sharded over tp when `tp` > 1 by column and row."""

    def __init__(self, tp: int = 1, **factory: Any) -> None:
        super().__init__()
        self.tp = tp
        self.norm = nn.Parameter(torch.empty(HIDDEN, **factory))
        self.gate_up = nn.Parameter(torch.empty(2 * FFN // tp, HIDDEN, **factory))
        self.down = nn.Parameter(torch.empty(HIDDEN, FFN // tp, **factory))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.norm
        if self.tp > 1:
            y = redistribute(y, "I", "R", "tp")
        gate, up = F.linear(y, self.gate_up).chunk(2, -1)
        y = F.linear(torch.tanh(gate) * up, self.down)
        if self.tp > 1:
            y = redistribute(y, "P", "I", "tp")
        return x + y


class Model(nn.Module):
    """The single-device model. `tied`: the head is the embedding."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.empty(VOCAB, HIDDEN))
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.head = self.embed if tied else nn.Parameter(torch.empty(VOCAB, HIDDEN))
        self.frozen = nn.Parameter(torch.empty(HIDDEN), requires_grad=False)
        self.unused = nn.Parameter(torch.empty(3))
        self.register_buffer("scale", torch.full((HIDDEN,), 0.5))

    def logits(self, input_ids: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.embed) * self.scale
        for block in self.blocks:
            x = block(x)
        return F.linear(x * self.frozen, self.head)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(input_ids).flatten(0, 1), labels.flatten())


def make_model(*, tied: bool = False, seed: int = 3) -> Model:
    """The model in float64, with weights that depend on the seed alone."""
    model = Model(tied=tied).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 * noise)
        # Another one for each seed, so that a buffer that is not loaded is seen.
        model.scale.add_(0.1 * torch.rand(HIDDEN, generator=generator, dtype=torch.float64))
    return model


def make_batch(rows: int, *, seed: int = 0) -> dict[str, Tensor]:
    """A global batch whose rows have from all to almost no targets."""
    generator = torch.Generator().manual_seed(seed)
    input_ids, labels = (torch.randint(VOCAB, (rows, SEQ), generator=generator) for _ in range(2))
    ignored = torch.rand(rows, SEQ, generator=generator) * rows < torch.arange(rows).unsqueeze(1)
    return {"input_ids": input_ids, "labels": labels.masked_fill(ignored, -100)}


def make_parallel(plan: Plan, model: nn.Module, *, tied: bool = False, **keywords: Any) -> Parallel:
    """This rank's part of `model` under `plan`."""
    schedule = build(
        plan.schedule,
        pp=plan.pp,
        num_microbatches=plan.num_microbatches,
        num_chunks=plan.num_chunks,
    )
    check(schedule)
    lowered = lower_by_hand(plan, tied=tied)
    return Parallel(lowered, schedule, make_mesh(plan.tp, plan.pp), model, **keywords)


@cache
def make_mesh(tp: int, pp: int) -> Mesh:
    """The mesh of a plan; a process keeps it, because process groups are slow to make."""
    return Mesh.create(Plan(tp=tp, pp=pp))


def lower_by_hand(plan: Plan, *, tied: bool = False) -> LoweredProgram:
    """What the compiler's `lower` would make of a `Model` in float64 under `plan`."""
    stages = tuple(_stage(index, plan, tied=tied) for index in range(plan.num_stages))
    spec = Input((ROWS, SEQ), torch.int64)
    return LoweredProgram(
        plan=plan,
        inputs={"input_ids": spec, "labels": spec},
        variables=_variables(tied=tied),
        target_counts={"num_targets": Count(_count_targets(), -1)},
        stages=stages,
        output_layouts=(INVARIANT,) * 3,
        output_widths={},
    )


class _Prologue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.empty(VOCAB, HIDDEN, **META))
        self.register_buffer("scale", torch.empty(HIDDEN, **META))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return F.embedding(input_ids, self.embed) * self.scale, input_ids.to(self.embed.dtype)


class _Epilogue(nn.Module):
    def __init__(self, head: nn.Parameter | None) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.empty(VOCAB, HIDDEN, **META)) if head is None else head
        self.frozen = nn.Parameter(torch.empty(HIDDEN, **META), requires_grad=False)

    def forward(self, x: Tensor, labels: Tensor, num_targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x * self.frozen, self.head)
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / num_targets, logits


class _StageModule(nn.Module):
    def __init__(
        self, prologue: nn.Module | None, blocks: list[nn.Module], epilogue: nn.Module | None
    ) -> None:
        super().__init__()
        self.prologue = prologue
        for index, block in enumerate(blocks):
            self.add_module(f"block_{index}", block)
        self.epilogue = epilogue
        self.num_blocks = len(blocks)

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        batch_inputs, received = list(args[:-2]), args[-2:]
        if self.prologue is not None:
            batch_inputs = list(args)
            received = self.prologue(batch_inputs.pop(0))
        x, relayed = received
        for index in range(self.num_blocks):
            x = self.get_submodule(f"block_{index}")(x)
        if self.epilogue is None:
            return x, relayed
        return (*self.epilogue(x, *batch_inputs), relayed)


def _stage(index: int, plan: Plan, *, tied: bool) -> Stage:
    is_first, is_last = index == 0, index == plan.num_stages - 1
    per_stage = NUM_BLOCKS // plan.num_stages
    numbers = range(index * per_stage, (index + 1) * per_stage)
    prologue = _Prologue() if is_first else None
    shared = prologue.embed if prologue is not None and tied else None
    module = _StageModule(
        prologue,
        [fx.symbolic_trace(Block(plan.tp, **META)) for _ in numbers],  # a graph: it is bound
        _Epilogue(shared) if is_last else None,
    )
    paths = {"embed": "prologue.embed", "scale": "prologue.scale"} if is_first else {}
    for place, number in enumerate(numbers):
        for name in ("norm", "gate_up", "down"):
            paths[f"blocks.{number}.{name}"] = f"block_{place}.{name}"
    if is_last:
        paths |= {"frozen": "epilogue.frozen"}
        paths |= {"embed" if tied else "head": "epilogue.head"}
    crossing = (
        Boundary("x", (ROWS, SEQ, HIDDEN), torch.float64, True),
        Boundary("relayed", (ROWS, SEQ), torch.float64, False),
    )
    return Stage(
        index=index,
        module=module,
        batch_inputs=("input_ids",) * is_first + ("labels", "num_targets") * is_last,
        received=() if is_first else crossing,
        sent=() if is_last else crossing,
        outputs=("loss", "logits", "relayed") if is_last else (),
        variables=paths,
    )


def _variables(*, tied: bool) -> dict[str, Variable]:
    model = Model(tied=tied)
    variables = {
        name: Variable(
            name=name,
            shape=tuple(parameter.shape),
            dtype=torch.float64,
            is_parameter=True,
            requires_grad=parameter.requires_grad,
            aliases=("head",) if tied and name == "embed" else (),
            layout=layouts.tp(PLACEMENTS.get(name.rpartition(".")[2], I)),
        )
        for name, parameter in model.named_parameters()
    }
    variables["scale"] = Variable("scale", (HIDDEN,), torch.float64, False, False)
    return variables


def _count_targets() -> fx.GraphModule:
    graph = fx.Graph()
    labels = graph.placeholder("labels")
    counted = graph.call_function(torch.ops.aten.ne.Scalar, (labels, -100))
    graph.output(graph.call_function(torch.ops.aten.sum.default, (counted,)))
    return fx.GraphModule(nn.Module(), graph)
