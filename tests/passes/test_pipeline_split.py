"""Where PipelineSplit cuts, what it clones, and what it says."""

import pytest
import torch
from torch import Tensor, nn

from ilm_compile.cost import HARDWARE
from ilm_compile.errors import PlanError
from ilm_compile.models import internlm2_tiny, internlm_tiny
from ilm_compile.passes import ActivationCheckpoint, PipelineSplit, lower, run_passes
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.rewrite.cut_points import crossing_bytes
from ilm_compile.rewrite.node_cost import step_seconds
from tests.support.tiny_model import HIDDEN, SEQ, TinyTransformer


def split(model: nn.Module, num_stages: int, hardware: str = "h100") -> Program:
    program = trace(model)
    run_passes(program, [PipelineSplit(num_stages=num_stages, hardware=hardware)])
    return program


def block_stages(program: Program) -> dict[str, set[int]]:
    """The stages of each block."""
    stages: dict[str, set[int]] = {r.name: set() for r in program.regions if r.is_block}
    for node in program.calls():
        region = program.regions[node.meta["region"]]
        if region.is_block and "stage" in node.meta:
            stages[region.name].add(node.meta["stage"])
    return stages


def stage_costs(program: Program, hardware: str) -> list[float]:
    seconds = step_seconds(program, HARDWARE[hardware])
    costs: dict[int, float] = {}
    for node, cost in seconds.items():
        if "stage" in node.meta:
            costs[node.meta["stage"]] = costs.get(node.meta["stage"], 0.0) + cost
    return [costs[stage] for stage in sorted(costs)]


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
def test_every_node_is_in_one_stage_or_a_clone(num_stages: int) -> None:
    program = split(TinyTransformer(skip=True, tied=True), num_stages)
    stages = [node.meta["stage"] for node in program.calls() if not node.meta.get("clone")]
    assert stages == sorted(stages)
    assert set(stages) == set(range(num_stages))
    assert not any("stage" in node.meta for node in program.calls() if node.meta.get("clone"))


def test_clones_are_what_no_parameter_reaches() -> None:
    program = split(TinyTransformer(), 2)
    clones = {str(node.target) for node in program.calls() if node.meta.get("clone")}
    assert {"aten.cos.default", "aten.arange.default"} <= clones
    assert not {"aten.embedding.default", "aten.linear.default"} & clones


@pytest.mark.parametrize("build", [internlm_tiny, internlm2_tiny])
def test_four_blocks_can_be_cut_into_eight_stages(build: type[nn.Module]) -> None:
    assert len(stage_costs(split(build(), 8), "h100")) == 8


def test_blocks_are_cut_at_the_residual_stream_only() -> None:
    lowered = lower(split(TinyTransformer(), 9))
    assert {(len(s.sent), s.sent[0].shape) for s in lowered.stages[:-1]} == {(1, (2, SEQ, HIDDEN))}


def test_cut_among_views_falls_between_blocks() -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.linear(x)).transpose(0, 1)

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Turning() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x)).sum()

    program = trace(Turned(), example_inputs={"x": ((3, 4, 4), torch.float32)})
    run_passes(program, [PipelineSplit(num_stages=2)])
    assert block_stages(program) == {"blocks.0": {0}, "blocks.1": {1}}


def test_large_vocabulary_leaves_fewer_blocks_to_the_last_stage() -> None:
    model = TinyTransformer(num_blocks=8, vocab=2000)
    stages = block_stages(split(model, 2, "cpu"))
    last = [name for name, used in stages.items() if used == {1}]
    assert len(last) < 4


def test_cost_beats_equal_numbers_of_layers() -> None:
    program = split(TinyTransformer(num_blocks=8, vocab=1000), 4, "cpu")
    by_cost = max(stage_costs(program, "cpu"))
    for node in program.calls():
        if "stage" in node.meta:
            name = program.regions[node.meta["region"]].name
            block = {"prologue": 0, "epilogue": 7}.get(name)
            node.meta["stage"] = (int(name.split(".")[1]) if block is None else block) // 2
    by_layers = max(stage_costs(program, "cpu"))
    assert by_cost < 0.95 * by_layers


def test_recompute_counts() -> None:
    program = trace(TinyTransformer())
    before = step_seconds(program, HARDWARE["h100"])
    run_passes(program, [ActivationCheckpoint(fraction=True)])
    after = step_seconds(program, HARDWARE["h100"])
    grown = {
        program.regions[node.meta["region"]].is_block
        for node in before
        if after[node] > before[node]
    }
    assert grown == {True}


def test_long_skip_is_relayed_and_does_not_forbid_cuts() -> None:
    lowered = lower(split(TinyTransformer(skip=True), 4))
    assert [len(stage.received) for stage in lowered.stages] == [0, 2, 2, 2]
    assert all(stage.received[0].name == "embedding" for stage in lowered.stages[1:])


def test_integer_that_depends_on_parameters_is_not_cut_across() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            chosen = self.first(x).argmax(-1, keepdim=True)
            return (self.second(x) * chosen).sum()

    program = trace(Routed(), example_inputs={"x": ((2, 4), torch.float32)})
    calls = list(program.calls())
    names = {calls[p].name: crossing for p, crossing in enumerate(crossing_bytes(calls))}
    assert names["linear_1"] == float("inf")
    assert names["sum_1"] == 2 * 4 * 4


def test_shared_parameter_is_reported() -> None:
    program = split(TinyTransformer(tied=True), 2)
    shared = "embed.weight (head.weight) is shared by stages 0, 1"
    assert any(shared in decision for decision in program.decisions)


def test_parameter_without_use_is_reported() -> None:
    model = TinyTransformer()
    model.unused = nn.Linear(2, 2)
    assert any("parameter unused.bias takes no part" in w for w in split(model, 2).warnings)


def test_each_stage_is_explained() -> None:
    program = split(TinyTransformer(), 2)
    assert program.decisions[0].startswith("pipeline-split: stage 0 runs prologue to blocks.1, ")
    assert program.decisions[0].endswith(f"sends {2 * SEQ * HIDDEN * 4:,} bytes per micro-batch")
    assert "to epilogue" in program.decisions[1]


def test_more_stages_than_cut_points_are_refused_with_both_numbers() -> None:
    message = r"= 12 stages need 11 cuts, but the model has 5 cut points .* use at most 6 stages"
    with pytest.raises(PlanError, match=message):
        split(TinyTransformer(num_blocks=2), 12)


def test_model_without_blocks_is_cut_where_least_crosses() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x))).square().sum()

    program = trace(Plain(), example_inputs={"x": ((3, 4), torch.float32)})
    run_passes(program, [PipelineSplit(num_stages=2)])
    assert lower(program).stages[0].sent[0].shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": 0}, "num_stages must be positive, got 0"),
        ({"num_stages": 1, "hardware": "abacus"}, "unknown hardware 'abacus'; known are .*h100"),
    ],
    ids=["no stage", "unknown hardware"],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PipelineSplit(**options)  # type: ignore[arg-type]
