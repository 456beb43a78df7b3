"""``compile=True``: the same training from compiled regions, each distinct one compiled once."""

from __future__ import annotations

import io
import logging
import re
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, fx, nn
from torch.nn import functional as F

import ilm_compile
from ilm_compile.cli.plan import add_plan_arguments, read_plan
from ilm_compile.errors import PlanError
from ilm_compile.ops.products import leaving_weight
from ilm_compile.program.expert_rows import grouped_product
from ilm_compile.program.functions import FUNCTIONS
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Source
from ilm_compile.program.remade import AGAIN, NEEDED, Remade
from ilm_compile.program.weight_parts import WeightParts
from ilm_compile.proof import zoo
from ilm_compile.runtime import Trainer, compiled
from ilm_compile.runtime.observe import Logger
from tests.support.compiled import skip_without_inductor
from tests.support.equality import Case, assert_equal
from tests.support.world import World

INPUTS = {name: ((2, zoo.SEQ), torch.int64) for name in ("input_ids", "labels")}
BACKEND = "aot_eager"  # all of torch.compile but the kernels that it would write
WIDTH, CLASSES = 8, 5
IN_PARTS = ["layers_0 (part 1 of 2)", "layers_0 (part 2 of 2)"]
aten = torch.ops.aten


@pytest.mark.parametrize(
    "plan",
    [
        {"tp": 2, "sequence_parallel": True, "checkpoint": True},
        {"cp": 2, "cp_attention": "queries"},
        {"tp": 2, "pp": 2, "kernels": "triton"},
        {"pp": 2, "schedule": "zb_v", "num_chunks": 2, "num_microbatches": 3, "checkpoint": True},
        {"pp": 2, "schedule": "zb_h1", "checkpoint": "selective"},
        {"tp": 2, "schedule": "zb_h1", "num_microbatches": 2, "kernels": "triton"},
    ],
    ids=lambda plan: "-".join(plan),
)
def test_compiled_regions_are_proven(plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = compilers(monkeypatch)
    model = zoo.make_model(zoo.MODELS["internlm2"])
    report = ilm_compile.verify(model, example_inputs=INPUTS, compile=BACKEND, **plan)
    assert report.ok, report
    assert report.max_grad_error < 1e-10
    assert len(made) == plan.get("tp", 1) * plan.get("cp", 1) * plan.get("pp", 1)
    for compilation in (each for compiler in made for each in compiler.compilations):
        assert (compilation.times, compilation.problem) == (1, ""), compilation


@pytest.mark.parametrize("plan", [{"tp": 2}, {"cp": 2}], ids=lambda plan: "-".join(plan))
def test_what_inductor_makes_is_proven(plan: dict[str, Any]) -> None:
    skip_without_inductor()
    model = zoo.make_model(zoo.MODELS["internlm2"])
    report = ilm_compile.verify(model, example_inputs=INPUTS, compile=True, **plan)
    assert report.ok, report
    assert report.max_grad_error < 1e-10


def compilers(monkeypatch: pytest.MonkeyPatch) -> list[compiled.RegionCompiler]:
    """All that are made from now on."""
    made: list[compiled.RegionCompiler] = []

    class Watched(compiled.RegionCompiler):
        def __init__(self, backend: str) -> None:
            super().__init__(backend)
            made.append(self)

    monkeypatch.setattr(compiled, "RegionCompiler", Watched)
    return made


@pytest.mark.parametrize(
    "case",
    [
        Case("internlm2", {"tp": 2, "compile": BACKEND}),
        Case("internlm2", {"tp": 2, "sequence_parallel": True, "compile": True}),
        Case("internlm2", {"zero": 3, "checkpoint": 0.5, "compile": BACKEND}, dp=2),
        Case("internlm2", {"pp": 2, "schedule": "zb_h1", "compile": BACKEND}),
        Case("internlm2", {"zero": 3, "schedule": "zb_h1", "compile": BACKEND}, dp=2),
        Case("Mixtral", {"ep": 2, "dispatch": True, "compile": BACKEND}),
    ],
    ids=str,
)
def test_real_processes_equal_the_single_device_model(case: Case, world2: World) -> None:
    assert_equal(world2, case, 1e-10)


class Blocks(nn.Module):
    """Two blocks that are alike, with dropout, between an embedding and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy((x @ self.embed.weight.t()).flatten(0, 1), labels.flatten())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.3, self.training)


def parallel_of(compile: bool | str) -> ilm_compile.Parallel:
    torch.manual_seed(0)
    inputs = {name: ((2, 4), torch.int64) for name in ("input_ids", "labels")}
    return ilm_compile.parallelize(Blocks().double(), example_inputs=inputs, compile=compile)


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randint(CLASSES, (2, 4)) for name in ("input_ids", "labels")}


def step(parallel: ilm_compile.Parallel) -> dict[str, Tensor]:
    """Loss and gradients of one step."""
    parallel.zero_grad()
    loss = parallel.execute_schedule(batch())
    assert isinstance(loss, Tensor)
    return {"loss": loss, **parallel.full_gradients()}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=bound, atol=bound)


def test_equal_blocks_are_compiled_once_and_evaluation_once_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    parallel, eager = parallel_of(BACKEND), parallel_of(False)
    assert eager.compilations == ()
    assert all(str(each).endswith("not run yet") for each in parallel.compilations)
    with caplog.at_level(logging.INFO, "ilm_compile.compile"):
        for _ in range(2):
            assert_alike(step(parallel), step(eager), 0.0)  # the same bits, dropout included
    said = [str(each) for each in parallel.compilations]
    (blocks,) = [each for each in parallel.compilations if len(each.regions) == 2]
    assert blocks.regions == ["blocks_0", "blocks_1"]
    assert re.fullmatch(r"blocks_0 \.\.\. blocks_1 \(2 alike\): compiled in \d+\.\d s", str(blocks))
    told = [each.getMessage() for each in caplog.records if each.name == "ilm_compile.compile"]
    assert told == [f"compile: {each}" for each in said]
    for each in (parallel, eager):
        each.eval()
    losses = [each.execute_schedule(batch(), forward_only=True) for each in (parallel, eager)]
    assert losses[0] == losses[1]
    times = [(*each.regions, each.times) for each in parallel.compilations]
    alike = ("blocks_0", "blocks_1", 1)  # without dropout they are another graph
    others = [("shared", 2), ("prologue", 2), ("epilogue", 2)]
    assert sorted(times) == sorted([alike, alike, *others])
    for each in (parallel, eager):
        each.train()
    assert_alike(step(parallel), step(eager), 0.0)


def test_a_run_says_once_what_was_compiled() -> None:
    parallel, text = parallel_of(BACKEND), io.StringIO()
    trainer = Trainer(parallel, hooks=[Logger(console=Console(file=text, width=250))])
    trainer.fit([batch()] * 2, 2, progress=False)
    first, *told, last = text.getvalue().splitlines()
    assert told == [f"compile: {each}" for each in parallel.compilations]
    assert (first.split()[:2], last.split()[:2]) == (["step", "1/2"], ["step", "2/2"])


def test_inductor_trains_alike() -> None:
    skip_without_inductor()
    parallel = parallel_of(True)
    assert_alike(step(parallel), step(parallel_of(False)), 1e-10)
    assert all(each.times == 1 for each in parallel.compilations)


def test_without_a_compiler_regions_run_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def none() -> str:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.warns(UserWarning, match="for the CPU: No working C.. compiler found; all regions"):
        parallel = parallel_of(True)
    assert parallel.compilations == ()
    assert_alike(step(parallel), step(parallel_of(False)), 0.0)


def region(call: Callable[..., Any], *sizes: int) -> fx.GraphModule:
    """A region that calls this of its input and a weight, of these sizes, between other calls."""
    graph, root = fx.Graph(), nn.Module()
    torch.manual_seed(0)
    root.weight = nn.Parameter(torch.randn(sizes))
    values = {"rows": torch.randn(4, WIDTH), "ends": torch.tensor([1, 4])}
    given = [graph.placeholder(name) for name in values]
    weight = graph.get_attr("weight")
    for node, value in zip((*given, weight), (*values.values(), root.weight), strict=True):
        node.meta["val"] = value
    halved = graph.call_function(aten.mul.Tensor, (given[0], 0.5))
    wide = graph.call_function(aten.tanh.default, (halved,))
    product = graph.call_function(call, (wide, weight, *([given[1]] if len(sizes) > 2 else [])))
    for node in (halved, wide, product):
        node.meta["val"] = values["rows"]
    product.meta["source"] = Source("layers.0.mlp", "model.py:7")
    narrow = graph.call_function(aten.sin.default, (product,))
    graph.output((graph.call_function(aten.exp.default, (narrow,)), wide))
    for node in (narrow, narrow.next):
        node.meta["val"] = values["rows"]
    return fx.GraphModule(root, graph)


def given(module: fx.GraphModule) -> list[Tensor]:
    """What a region takes; its rows have a gradient."""
    rows, ends = (node.meta["val"] for node in module.graph.find_nodes(op="placeholder"))
    return [rows.clone().requires_grad_(), ends]


def gradients(run: Callable[..., Any], module: fx.GraphModule) -> dict[str, Tensor | None]:
    """What a backward of all results of a region finds, the parts that it leaves apart."""
    inputs, parts = given(module), WeightParts()
    module.weight.grad = None
    with parts.collect():
        results = run(module, *inputs)
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    found = {"results": torch.stack(results).detach(), "rows": inputs[0].grad}
    found["weight before"], count = module.weight.grad, len(parts)
    parts.run()
    return {**found, "weight": module.weight.grad, "parts": torch.tensor(count)}


def test_what_cannot_be_compiled_runs_as_written_and_names_the_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_values(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight if x.tolist() else x

    monkeypatch.setitem(FUNCTIONS, by_values, None)
    module, compiler = region(by_values, WIDTH, WIDTH), compiled.RegionCompiler(BACKEND)
    run = compiler.code(module, "layers_0", type(module).forward)
    inputs = given(module)
    with pytest.warns(UserWarning, match="compile: layers_0") as warned:
        found = [run(module, *inputs)[0] for _ in range(2)]
    assert all(torch.equal(each, module(*inputs)[0]) for each in found)
    (compilation,) = compiler.compilations
    assert [str(each.message) for each in warned] == [f"compile: {compilation}"]
    message = "layers_0: runs as written, torch.compile cannot take it at node by_values "
    assert str(compilation).startswith(f"{message}(layers.0.mlp, model.py:7): ")


@pytest.mark.parametrize(
    ("call", "sizes", "compiled_as", "left"),
    [
        (leaving_weight(aten.mm.default), (WIDTH, WIDTH), ["layers_0"], 1),
        (leaving_weight(aten.linear.default), (WIDTH, WIDTH), ["layers_0"], 1),
        (grouped_product, (2, WIDTH, WIDTH), IN_PARTS, 0),
        (leaving_weight(grouped_product), (2, WIDTH, WIDTH), IN_PARTS, 1),
    ],
    ids=["mm", "linear", "experts", "experts-left"],
)
def test_a_region_leaves_weights_and_rows_of_experts_as_it_is_written(
    call: Callable[..., Any], sizes: tuple[int, ...], compiled_as: list[str], left: int
) -> None:
    module, compiler = region(call, *sizes), compiled.RegionCompiler(BACKEND)
    run = compiler.code(module, "layers_0", type(module).forward)
    expected = gradients(type(module).forward, module)
    for _ in range(2):
        found = gradients(run, module)
        assert found.keys() == expected.keys()
        assert found["parts"] == left
        assert (found["weight before"] is None) == (left > 0)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)
    said = [(*each.regions, each.times, each.problem) for each in compiler.compilations]
    assert said == [(name, 1, "") for name in compiled_as]
    with torch.no_grad():
        assert torch.equal(run(module, *given(module))[0], module(*given(module))[0])


def test_it_is_compiled_anew_for_inputs_that_lie_otherwise_or_have_a_gradient() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = given = torch.arange(4.0).view(2, 2)
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (x, 2.0)),))
    module, compiler = fx.GraphModule(nn.Module(), graph), compiled.RegionCompiler(BACKEND)
    run = compiler.code(module, "layers_0", type(module).forward)
    for times, value in enumerate((given, given.t(), given.clone().requires_grad_()), start=1):
        for _ in range(2):
            (found,) = run(module, value)
        assert torch.equal(found, 2 * value)
        assert found.requires_grad == value.requires_grad
        assert [each.times for each in compiler.compilations] == [times]


def test_selective_recompute_leaves_a_region_of_experts_as_it_is_written() -> None:
    module, compiler = region(grouped_product, 2, WIDTH, WIDTH), compiled.RegionCompiler(BACKEND)
    node = module.graph.find_nodes(op="call_function", target=aten.tanh.default)[0]
    node.meta[AGAIN] = NEEDED
    body, written = Remade(module).body, type(module).forward
    with pytest.warns(UserWarning, match="layers_0: runs as written, for rows of experts cut it"):
        assert compiler.code(body, "layers_0", written) is written
    assert compiler.code(body, "layers_1", written) is written
    assert [each.regions for each in compiler.compilations] == [["layers_0", "layers_1"]]


@pytest.mark.parametrize(("option", "expected"), [("--compile", True), ("--no-compile", False)])
def test_the_command_line_has_it(option: str, expected: bool) -> None:
    parser = ArgumentParser()
    add_plan_arguments(parser)
    assert read_plan(parser.parse_args([option]), Plan(compile=BACKEND)).compile is expected
    assert read_plan(parser.parse_args([]), Plan(compile=BACKEND)).compile == BACKEND


@pytest.mark.parametrize("wrong", ["nothing", "", 1])
def test_another_backend_is_refused(wrong: object) -> None:
    with pytest.raises(
        PlanError, match=rf"a backend of torch.compile \(.*inductor.*, got {wrong!r}"
    ):
        ilm_compile.make_plan(compile=wrong)
