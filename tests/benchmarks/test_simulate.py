"""`python -m benchmarks.simulate`: rows in, bubble rates out, or one clear error and no file."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import simulate

HEADER = "id,schedule,p,m,chunks,t_f,t_b,t_w,t_comm"
GOOD = {
    "a": "a,1f1b,8,24,1,18.522,18.086,9.337,0.601",
    "b": "b,zb_h1,8,24,1,18.522,18.086,9.337,0.601",
    "c": "c,zb_h2,8,24,1,18.522,18.086,9.337,0.601",
    "d": "d,interleaved_1f1b,2,4,2,1,1,1,0",
    "e": "e,gpipe,4,8,1,1,1,1,0",
    "f": "f,zb_h2,4,8,1,0.3,0.3,0.3,0",  # rounds to less than 0
    "g": "g,zb_v,4,8,2,2,2,2,0",
}


def run(folder: Path, *lines: str) -> dict[str, str]:
    rows, output = folder / "rows.csv", folder / "new" / "out.csv"
    rows.write_text("\n".join(lines))
    simulate.main([str(rows), "--output", str(output)])
    header, *found = output.read_text().splitlines()
    assert header == "id,bubble_rate"
    return dict(line.split(",") for line in found)


def test_rates_by_row(tmp_path: Path) -> None:
    found = run(tmp_path, HEADER, *GOOD.values())
    rates = {name: float(rate) for name, rate in found.items()}
    assert list(rates) == list(GOOD)
    assert [rates[k] for k in "abc"] == pytest.approx([0.2431, 0.1585, 0.1083], abs=5.1e-5)
    assert rates["d"] == pytest.approx(1 / 9)  # (p - 1) / (chunks m + p - 1)
    assert rates["e"] == pytest.approx(3 / 11)
    assert found["f"] == found["g"] == "0.000000000"


def test_columns_may_come_in_any_order_with_others_between(tmp_path: Path) -> None:
    header = "note, t_comm, t_w, t_b, t_f, chunks, m, p, schedule, id"
    assert run(tmp_path, header, "x, 0, 1, 1, 1, 1, 8, 4, gpipe, e") == {"e": "0.272727273"}


def test_a_share_of_the_times_is_a_chunks(tmp_path: Path) -> None:
    """The messages stay whole: two hops there and back, with one micro-batch."""
    rate = run(tmp_path, HEADER, "x,gpipe,2,1,2,2,2,2,1")["x"]
    assert float(rate) == pytest.approx(1 - 6 / (12 + 6))


BAD = {
    "no column": ([HEADER.replace("t_b,", "")], r"rows.csv: expected the column 't_b' once"),
    "column twice": ([f"{HEADER},p"], r"the column 'p' once, found it 2 times"),
    "empty": ([], r"the column 'id' once, found it 0 times"),
    "no row": ([HEADER], "expected at least one row"),
    "short": ([HEADER, GOOD["a"], "b,1f1b,8"], r"rows.csv:3: expected 9 cells .* got 3"),
    "long": ([HEADER, GOOD["a"] + ",1,2"], r"rows.csv:2: expected 9 cells .* got 11"),
    "no id": ([HEADER, GOOD["a"][1:]], r"rows.csv:2, row '', column 'id': expected a name"),
    "id twice": ([HEADER, GOOD["a"], GOOD["a"]], r"rows.csv:3, column 'id': 'a' names an earlier"),
    "schedule": ([HEADER, "b,zb,8,24,1,1,1,1,0"], r"row 'b', column 'schedule': .*zb_h1.* 'zb'"),
    "p": ([HEADER, "b,1f1b,0,24,1,1,1,1,0"], r"row 'b', column 'p': .* whole number .* got '0'"),
    "m": ([HEADER, "b,1f1b,8,2.5,1,1,1,1,0"], r"column 'm': .* whole number .* got '2.5'"),
    "chunks": ([HEADER, "b,1f1b,8,24,,1,1,1,0"], r"column 'chunks': .* whole number .* got ''"),
    "t_f": ([HEADER, "b,1f1b,8,24,1,0,1,1,0"], r"column 't_f': expected more than 0 .* got '0'"),
    "t_w": ([HEADER, "b,1f1b,8,24,1,1,1,-1,0"], r"column 't_w': .* at least 0, got '-1'"),
    "t_comm": ([HEADER, "b,1f1b,8,24,1,1,1,1,nan"], r"column 't_comm': expected a finite .* 'nan'"),
    "sizes": ([HEADER, "b,1f1b,8,24,2,1,1,1,0"], r"row 'b', columns .*'chunks': .*num_chunks=2"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    lines, message = BAD[case]
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, *lines)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_an_older_output_stays_after_an_error(tmp_path: Path) -> None:
    run(tmp_path, HEADER, GOOD["e"])
    before = (tmp_path / "new" / "out.csv").read_text()
    with pytest.raises(SystemExit):
        run(tmp_path, HEADER, GOOD["f"], "b,zb,8,24,1,1,1,1,0")
    assert (tmp_path / "new" / "out.csv").read_text() == before


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"none\.csv: expected a CSV file"):
        simulate.main([str(tmp_path / "none.csv"), "--output", str(tmp_path / "out.csv")])


def test_the_output_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"{HEADER}\n{GOOD['e']}\n")
    with pytest.raises(SystemExit, match="expected a file, got a folder"):
        simulate.main([str(tmp_path / "rows.csv"), "--output", str(tmp_path)])
