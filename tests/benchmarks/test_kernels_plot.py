"""The table and the curves of kernels' bandwidth, from a file made up here."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernels
from benchmarks.gpu.bandwidth import Entry, Row, judge
from benchmarks.gpu.timing import Times
from benchmarks.kernels import by_op, load, main, show
from ilm_compile.errors import IlmCompileError

PNG = b"\x89PNG"


def entry(fraction: float) -> Entry:
    return Entry(4000 * fraction, fraction, fraction, Times(1 / fraction, (1.0, 2.0), 0.0, 5))


def content() -> dict[str, Any]:
    """Two ops at two sizes, with a peer in the larger one."""
    rows = [
        judge(Row(op, direction, hidden, hidden, count, 8, {"ilm": entry(0.93), **peers}))
        for op in ("rms_norm", "swiglu")
        for hidden in (2048, 4096)
        for count, peers in ((4096, {}), (8192, {"Liger": entry(0.8)}))
        for direction in ("forward", "backward")
    ]
    result = {
        **{"copy_gb_per_s": 4000.0, "dtype": "bfloat16", "rows": rows, "untimed": ["a size"]},
        "peers_left_out": {"rms_norm": {"QuACK": "ModuleNotFoundError: quack"}},
    }
    facts = {"gpu": "NVIDIA H200", "cpu": "", "date": "2026-01-02", "torch": "2.11.0"}
    whole = {"circumstances": facts, "sections": {"bandwidth": {"ok": True, "result": result}}}
    found: dict[str, Any] = json.loads(json.dumps(whole, default=asdict))
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gpu-2026-01-02.json"
    path.write_text(json.dumps(content()))
    return path


def test_the_table_has_what_a_reader_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    show(content())
    printed = capsys.readouterr().out
    assert "NVIDIA H200, 2026-01-02, torch 2.11.0; a large copy moves 4000 GB/s" in printed
    (line, *_) = [s for s in printed.splitlines() if "8192" in s and "Liger" in s]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["2048", "8192", "3720", "93.0%", "Liger", "1.16", "ok", "ok"]
    assert "left out of rms_norm: QuACK, ModuleNotFoundError: quack" in printed
    assert "no time for 1 sizes" in printed


def test_rows_of_an_op_are_kept_together_whatever_their_order() -> None:
    rows = [{"op": "a"}, {"op": "b"}, {"op": "a"}]
    assert {op: len(found) for op, found in by_op(rows).items()} == {"a": 2, "b": 1}


def test_a_picture_of_each_op_is_drawn_beside_the_file(file: Path) -> None:
    main([str(file), "--plot"])
    pictures = sorted(file.parent.glob("*.png"))
    assert [p.name for p in pictures] == [f"{file.stem}-{op}.png" for op in ("rms_norm", "swiglu")]
    assert all(picture.read_bytes().startswith(PNG) for picture in pictures)


def test_curves_have_what_the_rows_have(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def keep(figure: Any, path: Path, **options: Any) -> None:
        path.touch()
        drawn.append(figure)

    monkeypatch.setattr("benchmarks.kernel_plots.Figure.savefig", keep)
    main([str(file), "--plot"])
    panels = drawn[0].axes
    assert [axis.get_title() for axis in panels] == [
        f"{direction}, hidden {hidden}"
        for direction in ("forward", "backward")
        for hidden in (2048, 4096)
    ]
    lines = {line.get_label(): line for line in panels[0].get_lines()}
    assert set(lines) == {"ilm", "Liger", "copy"}
    assert [*lines["ilm"].get_xdata()] == [4096, 8192]
    assert [*lines["Liger"].get_xdata()] == [8192]  # not there at 4096 rows
    assert lines["Liger"].get_ydata() == pytest.approx([3200.0])
    assert lines["copy"].get_ydata() == [4000.0, 4000.0]


def test_the_newest_file_with_figures_is_taken(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "gpu-2026-02-03.json").write_text('{"sections": {"equality": {"ok": true}}}')
    monkeypatch.setattr(kernels, "RESULTS", file.parent)
    assert load(None)[0] == file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "cannot read"),
        ('{"sections": {"bandwidth": {"ok": false, "error": "x"}}}', "expected a section"),
    ],
)
def test_a_file_without_figures_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "gpu.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(IlmCompileError, match=rf"{message}.*benchmarks\.gpu\.run_all"):
        load(path)


def test_no_file_at_all_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    with pytest.raises(IlmCompileError, match=r"got 0 such files.*benchmarks\.gpu\.run_all"):
        load(None)
