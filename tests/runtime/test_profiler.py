"""Traces, the pipeline of a real step and the memory of a rank, and that none costs when off."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Hook, Mesh, Trainer
from ilm_compile.runtime.guard.activity import ACTIVITY
from ilm_compile.runtime.mesh import Axis, Storage
from ilm_compile.runtime.observe import MemoryBreakdown, PipelineTimeline, Profiler
from ilm_compile.runtime.observe.memory import live_microbatches, module_of, region_labels
from ilm_compile.runtime.observe.memory_picture import draw_memory, format_bytes
from ilm_compile.runtime.observe.phases import PHASES
from ilm_compile.runtime.observe.places import rank_words
from ilm_compile.runtime.observe.saved import SavedBytes
from ilm_compile.runtime.observe.svg import WEIGHTS, ticks
from ilm_compile.runtime.observe.timeline_picture import (
    Row,
    bubble,
    compute_rows,
    draw_timelines,
)
from ilm_compile.schedule import Action, Kind, build
from tests.runtime.handmade import (
    FFN,
    HIDDEN,
    ROWS,
    SEQ,
    VOCAB,
    make_batch,
    make_model,
    make_parallel,
)
from tests.support.world import World

PARTS = ["gradient reduction", "loss", "gradient norm", "optimizer"]
SVG = "{http://www.w3.org/2000/svg}"
PP2 = Plan(pp=2, num_microbatches=4)


def train(*hooks: Hook, plan: Plan, num_steps: int = 3) -> Trainer:
    trainer = Trainer(make_parallel(plan, make_model()), hooks=hooks)
    rows = ROWS * plan.num_microbatches * trainer.parallel.mesh.dp.size
    batches = [make_batch(rows, seed=seed) for seed in range(num_steps)]
    trainer.fit(batches, num_steps, progress=False)
    return trainer


def observe_all(rank: int, folder: Path) -> list[bool]:
    hooks = [
        Profiler(folder, first_step=2, num_steps=1),
        PipelineTimeline(folder, step=3),
        MemoryBreakdown(folder, step=2),
    ]
    executor = train(*hooks, plan=PP2).parallel.executor
    return [executor.annotate, executor.record_timeline, ACTIVITY.watcher is not None]


@pytest.fixture(scope="module")
def observed(world2: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two pipeline ranks with every observer on."""
    folder = tmp_path_factory.mktemp("observed")
    assert world2.run(observe_all, folder) == [[False] * 3] * 2  # all is off again
    return folder


def test_each_observer_leaves_its_files_and_no_others(observed: Path) -> None:
    assert sorted(path.name for path in observed.iterdir()) == [
        "memory-rank-0.html",
        "memory-rank-1.html",
        "pipeline-step-3.svg",
        "trace-steps-2-2-rank-0.json",
        "trace-steps-2-2-rank-1.json",
    ]


def test_a_trace_names_every_action_of_the_rank_once(observed: Path) -> None:
    trace = json.loads((observed / "trace-steps-2-2-rank-1.json").read_text())
    counts = Counter(event.get("name", "") for event in trace["traceEvents"])
    for microbatch in range(4):
        assert counts[f"1F{microbatch} stage 1 forward micro-batch {microbatch}"] == 1
        assert counts[f"1B{microbatch} stage 1 backward micro-batch {microbatch}"] == 1
    assert any("SEND_B" in name for name in counts)
    assert counts["aten::linear"] > 0


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_a_timeline_shows_every_action_planned_and_measured(observed: Path) -> None:
    svg = (observed / "pipeline-step-3.svg").read_text()
    tips = [e.text or "" for e in ElementTree.fromstring(svg).iter(f"{SVG}title")]
    rows = compute_rows(build("1f1b", pp=2, num_microbatches=4))
    for unit, after in (("of one stage", []), ("ms, simulated", []), ("ms", PARTS)):
        shown = [tip.split(":")[0] for tip in tips if tip.endswith(unit)]
        assert shown == [text for row in rows for text in [*map(str, row), *after]]
    headings = [text for text in texts(svg) if text.endswith("idle")]
    assert headings[0] == "planned: 20.0% idle"
    assert headings[1].startswith("simulated from the medians measured: ")
    assert headings[2].startswith("measured: ")


def test_measured_actions_of_two_ranks_share_one_clock(observed: Path) -> None:
    """A stage's forward ends before the next one's begins, whoever timed it."""
    svg = (observed / "pipeline-step-3.svg").read_text()
    spans = {
        match[1]: (float(match[2]), float(match[3]))
        for match in re.finditer(r"<title>(\d[FB]\d): ([\d.e+-]+) to ([\d.e+-]+) ms</title>", svg)
    }
    assert len(spans) == 16
    for microbatch in range(4):
        # three digits are shown
        assert spans[f"0F{microbatch}"][1] <= spans[f"1F{microbatch}"][0] * 1.01 + 0.01
        assert spans[f"1B{microbatch}"][1] <= spans[f"0B{microbatch}"][0] * 1.01 + 0.01


def test_the_idle_share_counts_from_the_first_start_to_the_last_end() -> None:
    rows = [[Action.parse("0F0"), Action.parse("0B0")], [Action.parse("1F0"), Action.parse("1B0")]]
    spans = dict(
        zip([a for row in rows for a in row], [(2, 3), (6, 8), (3, 4), (4, 6)], strict=True)
    )
    assert bubble(rows, spans) == pytest.approx(1 - 6 / 12)


@pytest.mark.parametrize(("pp", "num_microbatches", "chunks"), [(8, 16, 1), (8, 32, 2)])
def test_every_planned_forward_is_labelled(pp: int, num_microbatches: int, chunks: int) -> None:
    name = "interleaved_1f1b" if chunks > 1 else "1f1b"
    schedule = build(name, pp=pp, num_microbatches=num_microbatches, num_chunks=chunks)
    every = [action for row in compute_rows(schedule) for action in row]
    svg = draw_timelines(schedule, {a: (i, i + 1e-3) for i, a in enumerate(every)}, title="step")
    planned = svg[: svg.index("simulated")]
    found = re.findall(r"<rect[^>]*><title>(\d+F\d+): .*\n<text[^>]*>(\w+)</text>", planned)
    assert len(found) == sum(action.kind is Kind.F for action in every)
    assert all(label in (action, action.rpartition("F")[2]) for action, label in found)


def test_rows_tell_ranks_stages_and_what_came_after_the_schedule() -> None:
    schedule = build("interleaved_1f1b", pp=2, num_microbatches=2, num_chunks=2)
    every = [action for row in compute_rows(schedule) for action in row]
    spans = {action: (i, i + 1.0) for i, action in enumerate(every)}
    rows = [Row("rank 0 (pp 0, dp 0)", {"optimizer": (20.0, 24.0)}), Row("rank 2 (pp 1, dp 0)")]
    svg = draw_timelines(schedule, spans, title="step", ranks=rows, dp=2)
    for text in ("rank 2 (pp 1, dp 0)", "stages 0, 2", "stages 1, 3"):
        assert texts(svg).count(text) == 3
    assert "<title>optimizer: 2e+04 to 2.4e+04 ms</title>" in svg
    # a legend, and the last backward of each of four stages in every panel
    assert svg.count(PHASES["gradients"][1]) == 1 + 3 * 4
    assert svg.count("reduces over dp") == 1
    assert "reduces over dp" not in draw_timelines(schedule, spans, title="step")


def test_weight_parts_have_a_color_and_the_last_of_a_stage_reduces() -> None:
    schedule = build("zb_v", pp=2, num_microbatches=3, num_chunks=2)
    every = [action for row in compute_rows(schedule) for action in row]
    spans = {action: (i, i + 1.0) for i, action in enumerate(every)}
    svg = draw_timelines(schedule, spans, title="step", dp=2)
    assert [t for t in texts(svg) if t.startswith("weights")] == [
        "weights, chunk 0",
        "weights, chunk 1",
    ]
    # a legend, and three weight parts of each of two stages in every panel
    assert [svg.count(color) for color in WEIGHTS[:2]] == [1 + 3 * 2 * 3] * 2
    assert svg.count(PHASES["gradients"][1]) == 1 + 3 * 4
    one = build("1f1b", pp=1, num_microbatches=1)
    whole = draw_timelines(one, dict.fromkeys(one.actions[0], (0.0, 1.0)), title="step")
    assert "weights" not in whole


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((2, 1, 1), "rank 1"),
        ((2, 3, 1), "rank 3 (pp 1, dp 0)"),
        ((2, 2, 2), "rank 4 (pp 1, dp 0, tp 0)"),
    ],
)
def test_a_rank_is_called_by_its_place(sizes: tuple[int, ...], words: str) -> None:
    pp, dp, tp = (Axis(0, size) for size in sizes)
    mesh = Mesh(pp, dp, Axis(), Axis(), tp, Storage(dp), Storage(dp), torch.device("cpu"))
    assert rank_words(mesh, 1) == words


def boxes(svg: str) -> list[dict[str, float]]:
    return [
        {key: float(rect.attrib[key]) for key in ("x", "y", "width", "height")}
        for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect")
        if rect.find(f"{SVG}title") is not None
    ]


@pytest.mark.parametrize(("pp", "chunks"), [(1, 1), (4, 1), (4, 2)])
def test_boxes_of_a_timeline_stay_in_the_picture_and_apart(pp: int, chunks: int) -> None:
    name = "interleaved_1f1b" if chunks > 1 else "1f1b"
    schedule = build(name, pp=pp, num_microbatches=8, num_chunks=chunks)
    every = [action for row in compute_rows(schedule) for action in row]
    spans = {action: (0.01 * i, 0.01 * i + 0.009) for i, action in enumerate(every)}
    svg = draw_timelines(schedule, spans, title="<step> & more")
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    rows: dict[float, list[tuple[float, float]]] = {}
    for box in boxes(svg):
        assert 0 <= box["x"]
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= height
        rows.setdefault(box["y"], []).append((box["x"], box["x"] + box["width"]))
    assert len(rows) == 3 * pp
    for spans_of_row in rows.values():
        ordered = sorted(spans_of_row)
        assert all(a[1] <= b[0] + 0.01 for a, b in pairwise(ordered))


def numbers(page: str) -> dict[str, list[str]]:
    rows = re.findall(r"<tr>(<td>.*?)</tr>", page)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    return {name: values for name, *values in cells}


def test_memory_is_what_the_ranks_parameters_take(observed: Path) -> None:
    """float64; Adam keeps two tensors like a parameter and a float32 count of its steps."""
    table = numbers((observed / "memory-rank-1.html").read_text())
    block = [HIDDEN, 2 * FFN * HIDDEN, HIDDEN * FFN]
    size = 8 * sum(block)
    expected = [format_bytes(n) for n in (size, size, 2 * size + 4 * len(block))]
    for name in ("blocks.2", "blocks.3"):
        assert table[name][:3] == expected
    head = 8 * VOCAB * HIDDEN
    frozen = 8 * HIDDEN
    assert table["frozen, head"][:2] == [format_bytes(head + frozen), format_bytes(head)]
    assert list(table) == ["blocks.2", "blocks.3", "frozen, head", "total"]


def test_activations_are_those_of_the_microbatches_in_flight(observed: Path) -> None:
    """Of two stages under 1F1B the first holds two micro-batches, the second one."""
    first, second = (
        numbers((observed / f"memory-rank-{rank}.html").read_text()) for rank in (0, 1)
    )
    # x, y = x * norm, gate and up, tanh(gate), tanh(gate) * up; chunks are views of one tensor
    block = 8 * ROWS * SEQ * (2 * HIDDEN + 2 * FFN + FFN + FFN)
    assert second["blocks.3"][3] == format_bytes(block)
    assert first["blocks.1"][3] == format_bytes(2 * block)


def test_a_page_needs_no_other_file(observed: Path) -> None:
    page = (observed / "memory-rank-0.html").read_text()
    assert not re.search(r"<script|<link|src=|href=|url\(|@import", page)
    assert page.startswith("<!doctype html>")
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    assert {"pipeline ranks", "modules of rank 0", "rank 1", "blocks.0"} <= set(texts(svg))


def test_names_in_a_picture_are_escaped() -> None:
    sizes = Counter(parameters=2**20)
    page = draw_memory("rank 0", {"rank 0": sizes}, {"<b>&": sizes}, step=1)
    assert "<b>" not in page
    assert numbers(page)["&lt;b&gt;&amp;"][0] == "1 MiB"


def test_the_allocators_peak_stands_beside_what_is_known() -> None:
    sizes = {"rank 0": Counter(parameters=3 * 2**19), "rank 1": Counter(parameters=2**20)}
    page = draw_memory("rank 0", sizes, {}, step=1, peaks={"rank 0": 2**21, "rank 1": 2**19})
    assert {"1.5 MiB of 2 MiB", "1 MiB of 512 KiB"} <= set(re.findall(r">([^<>]+)</text>", page))
    assert "The rest of the allocator" in page
    assert "allocator" not in draw_memory("rank 0", sizes, {}, step=1)


def test_the_fullest_moment_weighs_stages_by_their_bytes() -> None:
    row = tuple(Action.parse(text) for text in "0F0 0F1 0B0 0B1 1F0 1F1 1B0 1B1".split())
    assert live_microbatches(row, {0: 5, 1: 3}) == {0: 2}
    assert {k: v for k, v in live_microbatches(row, {0: 3, 1: 5}).items() if v} == {1: 2}


def test_a_micro_batch_is_live_until_its_weight_part() -> None:
    row = tuple(Action.parse(text) for text in "0F0 0B0 0F1 0B1 0W0 0F2 0B2 0W1 0W2".split())
    assert live_microbatches(row, {0: 1}) == {0: 2}


@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        ("layers.3.attention.wqkv.weight", "layers.3"),
        ("model.layers.11.mlp.up_proj.weight", "model.layers.11"),
        ("model.norm.weight", "model.norm"),
        ("output.weight", "output"),
        ("head", "head"),
    ],
)
def test_a_parameter_is_shown_under_its_block(parameter: str, module: str) -> None:
    assert module_of(parameter) == module


def test_a_region_is_named_after_all_modules_in_it() -> None:
    variables = {"norm.weight": "epilogue.a", "output.weight": "epilogue.b", "scale": "scale"}
    assert region_labels(variables) == {"epilogue": "norm, output", "": "scale"}


class Body(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x * weight).exp().sum()


def test_tensors_are_counted_once_and_parameters_not() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10))
            self.body = Body()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.view(2, 5).view(10), self.weight) + (x * x).sum()

    class FakeStage:
        index, module, batch_inputs = 3, Wrapper(), ()

    saved = SavedBytes([FakeStage()])  # type: ignore[list-item]
    saved.start()
    FakeStage.module(torch.randn(10, requires_grad=True)).backward()
    with torch.no_grad():  # the second forward does not count, here one that saves nothing
        FakeStage.module(torch.randn(10))
    saved.stop()
    # x and the result of exp in the body; x * x saves x, which is counted already
    assert saved.bytes == {3: {"body": 80}}


def windows(folder: Path, last_step: int, **options: Any) -> list[str]:
    train(Profiler(folder, **options), plan=Plan(num_microbatches=1), num_steps=last_step)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_windows_repeat_and_one_cut_short_is_kept(tmp_path: Path) -> None:
    names = windows(tmp_path / "a", 5, first_step=2, num_steps=2, every=3)
    assert names == ["trace-steps-2-3-rank-0.json", "trace-steps-5-5-rank-0.json"]


def test_a_window_that_is_not_reached_leaves_nothing(tmp_path: Path) -> None:
    assert windows(tmp_path / "a", 1, first_step=2) == []


def test_off_the_executor_runs_the_very_functions_of_its_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was named in a step that nobody profiles")

    monkeypatch.setattr(torch.profiler, "record_function", refuse)
    train(plan=Plan(num_microbatches=1), num_steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_step": 0}, "first_step and num_steps must be 1 or above, got 0 and 2"),
        ({"num_steps": 3, "every": 2}, "every must be at least num_steps=3, got 2"),
    ],
)
def test_windows_that_make_no_sense_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(IlmCompileError, match=message):
        Profiler("unused", **options)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, [0]),
        (33, [0, 10, 20, 30]),
        (0.07, [0, 0.02, 0.04, 0.06]),
    ],
)
def test_ticks_are_round_numbers(limit: float, expected: list[float]) -> None:
    assert ticks(limit) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1536, "1.5 KiB"),
        (123_456_789, "118 MiB"),
        (1 << 40, "1024 GiB"),
    ],
)
def test_bytes_are_shown_to_three_digits(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
