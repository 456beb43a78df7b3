"""The page of a search and a plan: whole, self-contained, and what it says is what was found."""

import re
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import ilm_compile
from ilm_compile.models import internlm2_tiny
from ilm_compile.planner import Rejected, Search, search, simulate_step
from ilm_compile.planner.pictures import memory_picture
from ilm_compile.planner.report import write_report
from ilm_compile.program.program import Program
from ilm_compile.runtime.observe.svg import text_width

VOID = {"meta", "br"}


class Page(HTMLParser):
    """The tags that a page opens and closes, and the words in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.words = ""
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


@cache
def program() -> Program:
    inputs = {name: ((2, 32), torch.int64) for name in ("input_ids", "labels")}
    model = internlm2_tiny(max_seq_len=32)
    return ilm_compile.partition(model, example_inputs=inputs, pp=2, num_microbatches=4)


@cache
def found() -> Search:
    traced = ilm_compile.trace(internlm2_tiny())
    return search(traced, 8, "h100", tokens_per_batch=4096, seq=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    failed = [Rejected("tp=<b>", "does not compile: a & b")]
    write_report(path, found=found(), program=program(), failed=failed, proof="step ok <1e-10")
    return path.read_text()


def test_every_part_is_there_and_every_tag_is_closed(text: str) -> None:
    page = Page(text)
    assert page.open == []
    assert page.titles == [
        *("The fastest", "All that fit, by time and memory", "Why not another", "Proof"),
        *("The step, simulated", "Memory of each pipeline rank", "Stages"),
        *("What was done, and what is sent", "plan.json"),
    ]
    assert page.tags.count("svg") == 3


def test_it_needs_nothing_else(text: str) -> None:
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert set(re.findall(r"https?://[^'\" ]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_the_fastest_is_said_with_its_time(text: str) -> None:
    best = found().best
    page = Page(text)
    assert best.name in page.words
    assert f"{best.time.total:.3f} s" in page.words


def test_words_are_not_taken_for_tags(text: str) -> None:
    words = Page(text).words
    assert "tp=<b>" in words
    assert "a & b" in words
    assert "step ok <1e-10" in words


def test_the_picture_has_every_action(text: str) -> None:
    step = simulate_step(program())
    computes = [a for row in step.simulation.schedule.actions for a in row if a.is_compute]
    titles = re.findall(r"<title>(\d[FBW]\d+):", text)
    assert sorted(titles) == sorted(map(str, computes))


def test_a_plan_alone_has_a_page(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    write_report(path, program=program())
    page = Page(path.read_text())
    assert page.titles[0] == "Proof"
    assert "nothing was proven" in page.words
    assert page.tags.count("svg") == 2


def test_no_label_lies_on_the_lines_of_the_memory_or_on_another() -> None:
    inputs = {name: ((2, 32), torch.int64) for name in ("input_ids", "labels")}
    model = internlm2_tiny(max_seq_len=32, num_layers=16)
    step = simulate_step(
        ilm_compile.partition(model, example_inputs=inputs, pp=16, num_microbatches=16)
    )
    picture = memory_picture(step, step.peak(0))
    lowest = max(float(y) for y in re.findall(r"<line [^>]*y2='([\d.]+)'", picture))
    found = re.findall(r"<text x='([\d.]+)' y='([\d.]+)'[^>]*>(rank \d+: [^<]*|seconds)<", picture)
    places = {words: (float(x), float(y)) for x, y, words in found}
    assert len(places) == 17
    below = places.pop("seconds")[1]
    assert lowest < below < min(y for _, y in places.values())
    rows = sorted((y, x, text_width(words, 12)) for words, (x, y) in places.items())
    assert all(x + width < after for (y, x, width), (to, after, _) in pairwise(rows) if y == to)
