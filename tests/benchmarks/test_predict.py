"""Predicting published steps: files, blanks, errors, and how near the predictions are."""

import csv
from pathlib import Path

import pytest

from benchmarks.predict import main
from benchmarks.step_rows import COLUMNS

# Rows of every kind that is published. Sources: Narayanan et al. 2021, table 1; Zero Bubble, tables
# 4 and 6; vTrain f8dda84, data/ground_truth_*.csv; mosaicml/llm-foundry 8c8dd48f7, benchmarking.
HEADER = ",".join((*COLUMNS[:2], "model", *COLUMNS[2:], "step_s", "memory_gb"))
SINGLE = "vTrain@f8dda84 data/ground_truth_single.csv,GPT"
MULTI = "vTrain@f8dda84 data/ground_truth_multi.csv,GPT"
FOUNDRY = "mosaicml/llm-foundry@8c8dd48f7 scripts/train/benchmarking/README.md"
ZERO_BUBBLE = "ZeroBubble arXiv:2401.10241 Table 4"
ROWS = f"""
a,{SINGLE},1024,20,16,16,4096,2,51200,1024,a100-80g,8,8,1,1,1,8,2,128,full,0,no,1f1b,bf16,0.602623,
b,{SINGLE},2048,24,16,16,8192,2,51200,1024,a100-80g,8,8,1,4,1,2,1,16,full,0,no,1f1b,bf16,0.312344,
c,{SINGLE},2048,16,16,16,8192,2,51200,1024,a100-80g,8,4,4,1,1,1,4,8,full,0,no,1f1b,bf16,0.179089,
d,{MULTI},6144,40,48,48,24576,2,51200,2048,a100-80g,8,256,8,1,1,32,4,1024,full,0,no,1f1b,bf16,9.9276,
e,{MULTI},8192,48,64,64,32768,2,51200,2048,a100-80g,8,512,8,8,1,8,4,1536,full,0,no,1f1b,bf16,14.9671,
f,{FOUNDRY},MPT-7b,4096,32,32,32,16384,2,50368,2048,h100,8,128,1,1,1,128,6,768,none,fsdp(zero3),,1f1b,bf16,1.17308,
g,{FOUNDRY},MPT-1b,2048,24,16,16,8192,2,50368,16384,h100,8,8,1,1,1,8,2,64,none,fsdp(zero3),,1f1b,bf16,6.67067,
h,{ZERO_BUBBLE},GPT-1.5B,2304,22,24,24,9216,2,51200,1024,a100-80g,8,8,1,8,1,1,6,192,none,0,,1F1B,bf16,1.92,30.0
i,{ZERO_BUBBLE},GPT-28.3B,6144,62,48,48,24576,2,51200,1024,a100-80g,8,32,1,32,1 layer/chunk,1,1,256,none,0,,1F1B-I,bf16,8.88889,58.0
""".strip().splitlines()  # noqa: E501


def predicted(folder: Path, *rows: str) -> dict[str, tuple[str, str]]:
    source, target = folder / "rows.csv", folder / "out.csv"
    source.write_text("\n".join((HEADER, *rows)) + "\n")
    main([str(source), "--output", str(target)])
    with target.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["id"] for row in found] == [row.split(",")[0] for row in rows]
    return {row["id"]: (row["predicted_s"], row["predicted_memory_gb"]) for row in found}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split(",")[0])
def test_a_published_step_is_near(tmp_path: Path, row: str) -> None:
    *_, seconds, gigabytes = row.split(",")
    ((time, memory),) = predicted(tmp_path, row).values()
    assert float(time) == pytest.approx(float(seconds), rel=0.1)
    if gigabytes:
        assert float(memory) == pytest.approx(float(gigabytes), rel=0.05)


def changed(row: str, **cells: str) -> str:
    return ",".join(
        cells.get(name, value)
        for name, value in zip(HEADER.split(","), row.split(","), strict=True)
    )


def test_chunks_make_1f1b_interleaved(tmp_path: Path) -> None:
    more = changed(ROWS[1], id="more", chunks="3")
    found = predicted(tmp_path, ROWS[1], more)
    assert float(found["more"][0]) < 0.99 * float(found["b"][0])


@pytest.mark.parametrize(
    ("cells", "note"),
    [
        ({"micro_batch": ""}, "micro_batch is blank, taken as 1"),
        ({"recompute": ""}, "recompute is blank, taken as selective"),
        ({"recompute": "some"}, "recompute 'some' is not known, taken as selective"),
        ({"schedule": "zigzag"}, "schedule 'zigzag' is not known, taken as 1f1b"),
        ({"zero": "hsdp"}, "zero 'hsdp', taken as zero1"),
        ({"zero": "fsdp"}, "zero 'fsdp', taken as zero3"),
        ({"dp": "2"}, "dp=2, taken as n_gpus / (tp * pp) = 8"),
        ({"source": "a blog"}, "source 'a blog' is not known, taken to run megatron"),
    ],
    ids=str,
)
def test_what_is_assumed_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cells: dict[str, str], note: str
) -> None:
    found = predicted(tmp_path, changed(ROWS[0], **cells))
    assert float(found["a"][0]) > 0
    assert f"predict: {note} (1 rows, a first)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"gpu": "abacus"}, "gpu='abacus' is not known; known are a100-40g, a100-80g"),
        ({"hidden": "wide"}, "hidden='wide'; expected a number above 0"),
        ({"layers": "1.5"}, "layers='1.5'; expected a whole number"),
        ({"n_gpus": "7", "tp": "2"}, "n_gpus=7 is not a multiple of tp * pp = 2"),
        ({"kv_heads": "3"}, "heads=16 is not a multiple of kv_heads=3"),
        ({"precision": "fp8"}, "no peak FLOP/s of a100-80g for precision 'fp8'"),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_read_is_left_blank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cells: dict[str, str], message: str
) -> None:
    found = predicted(tmp_path, changed(ROWS[0], **cells), ROWS[1])
    assert found["a"] == ("", "")
    assert float(found["b"][0]) > 0
    said = capsys.readouterr().err
    assert f"row a: {message}" in said.replace("cost: ", "")
    assert "1 of 2 rows left blank" in said


def test_a_file_without_a_column_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "rows.csv"
    source.write_text("id,source\na,b\n")
    assert main([str(source), "--output", str(tmp_path / "out.csv")]) == 1
    assert "no column hidden, layers" in capsys.readouterr().err


def test_errors_and_regret_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rows.csv"
    better, worse = ROWS[0], changed(ROWS[0], id="z", tp="8", dp="1", micro_batch="1")
    slower = changed(worse, step_s="9.0")
    source.write_text("\n".join((HEADER, better, slower)) + "\n")
    assert main([str(source), "--output", str(tmp_path / "out.csv"), "--errors"]) == 0
    printed = capsys.readouterr().out
    assert "A100 node sweep" in printed
    assert "regret: 0.0%" in printed
