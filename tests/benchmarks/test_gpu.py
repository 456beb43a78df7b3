"""The script for GPU machines, run on the CPU at tiny sizes."""

import faulthandler
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import ilm_compile
from benchmarks.common import make_model
from benchmarks.gpu import run_all
from benchmarks.gpu.bandwidth import ROWS
from benchmarks.gpu.blocks import SHAPES, SMOKE_SHAPES, block_flops, peak_flops
from benchmarks.gpu.failure import OutOfTime, Result, SectionError
from benchmarks.gpu.ops import CHECKED, TIMED
from benchmarks.gpu.run_all import (
    COMMANDS,
    SECTIONS,
    START_S,
    WRONG_S,
    Section,
    after_checks,
    main,
    run_sections,
    time_limit,
)

CPU = torch.device("cpu")


def run_one(tmp_path: Path, section: Section) -> dict[str, Any]:
    path = tmp_path / "gpu.json"
    run_sections({"one": section}, CPU, path, smoke=True, console=Console(quiet=True))
    found: dict[str, Any] = json.loads(path.read_text())["sections"]["one"]
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of all sections, but for the tests, writes."""
    if torch.cuda.is_available():
        pytest.skip("the script refuses the CPU beside a GPU")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gpu")
    chosen = [f"--only={name}" for name in SECTIONS if name != "gpu_tests"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secrets.randbits", lambda bits: 1)  # the same numbers in every run
        main(["--device", "cpu", "--smoke", "--output", str(folder), *chosen])
    (path,) = folder.glob("gpu-*.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_all_sections_run_on_the_cpu(written: dict[str, Any]) -> None:
    assert {name: section["ok"] for name, section in written["sections"].items()} == {
        name: True for name in SECTIONS if name != "gpu_tests"
    }


def test_the_file_says_where_it_was_measured(written: dict[str, Any]) -> None:
    assert written["circumstances"]["torch"] == torch.__version__
    assert written["device"] == "cpu"
    assert set(written["versions"]) >= {"triton", "liger-kernel", "flash-attn", "quack-kernels"}


def test_plans_are_compared(written: dict[str, Any]) -> None:
    assert len(written["sections"]["equality"]["result"]["relative_errors"]) == 6


def test_every_op_is_checked_in_every_dtype(written: dict[str, Any]) -> None:
    result = written["sections"]["kernel_correctness"]["result"]
    dtypes = ("float32", "float16", "bfloat16")
    assert set(result["worst"]) == {f"{op}, {dtype}" for op in CHECKED for dtype in dtypes}
    assert result["faults"] == []


def test_every_timed_op_has_a_row_by_direction_and_size(written: dict[str, Any]) -> None:
    result = written["sections"]["bandwidth"]["result"]
    found = [(row["op"], row["direction"], row["rows"]) for row in result["rows"]]
    expected = [(op, d, n) for n in (16, 32) for op in TIMED for d in ("forward", "backward")]
    assert found == expected
    assert all({"ilm", "eager torch"} <= set(row["entries"]) for row in result["rows"])


def test_blocks_are_timed_with_both_kinds_of_kernels_beside_eager_models_and_a_llama(
    written: dict[str, Any],
) -> None:
    result = written["sections"]["blocks"]["result"]
    assert result["left_out"] == {}
    contestants = {name: entry for name, entry in result["tiny"].items() if name != "shape"}
    assert len(contestants) == 7
    for entry in contestants.values():
        assert entry["tokens_per_second"] == pytest.approx(2 * 16 / entry["step_time_s"])
        assert entry["busiest_ops"]


def test_the_probe_finds_ceilings_attentions_and_what_the_host_costs(
    written: dict[str, Any],
) -> None:
    result = written["sections"]["probe"]["result"]
    assert result["ceilings"]["copy_bytes_per_s"] > 0
    assert result["attention"]["sdpa"]["from_the_first"] < 2e-2
    assert "needs a CUDA device" in result["attention"]["sdpa, FA3"]["left_out"]
    assert set(result["host"]) >= {"add", "ilm rms_norm"}


def test_a_kernel_is_compared_with_a_copy_of_its_own_size_too(written: dict[str, Any]) -> None:
    result = written["sections"]["bandwidth"]["result"]
    assert max(result["product_flops"].values()) > 0
    for row in result["rows"]:
        assert all(entry["of_own_copy"] > 0 for entry in row["entries"].values())


def test_flops_of_a_block_are_counted_without_its_weights() -> None:
    (shape,) = SMOKE_SHAPES.values()
    model = make_model(shape.preset, shape.changes, device="cpu")
    example = model.example_inputs(shape.rows, shape.seq)
    assert block_flops(shape) == ilm_compile.parallelize(model, example_inputs=example).model_flops


def test_the_largest_model_and_the_telling_rows_come_first() -> None:
    assert next(iter(SHAPES)) == "InternLM2-7B"
    assert ROWS[0] == (8192, 32768)


def test_a_failing_section_is_recorded(tmp_path: Path) -> None:
    def fail(device: torch.device, smoke: bool, result: Result) -> None:
        raise RuntimeError("no such kernel")

    found = run_one(tmp_path, Section(fail, 10))
    assert not found["ok"]
    assert found["error"].splitlines()[-1] == "RuntimeError: no such kernel"


def test_a_section_with_faults_keeps_its_figures(tmp_path: Path) -> None:
    def fail(device: torch.device, smoke: bool, result: Result) -> None:
        result["error"] = 2.0
        raise SectionError("one fault")

    found = run_one(tmp_path, Section(fail, 10))
    assert (found["ok"], found["error"], found["result"]) == (False, "one fault", {"error": 2.0})


def test_a_section_that_hangs_is_stopped_whatever_it_catches(tmp_path: Path) -> None:
    def hang(device: torch.device, smoke: bool, result: Result) -> None:
        result["first"] = 1
        while True:
            try:
                time.sleep(30)
            except Exception:
                continue

    found = run_one(tmp_path, Section(hang, 0.1))
    assert "longer than its budget of 0.4 s" in found["error"]
    assert found["result"] == {"first": 1}
    assert found["seconds"] < 5


def test_the_time_limit_leaves_no_alarm_behind() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(OutOfTime), time_limit(0.05):
        time.sleep(5)


@pytest.mark.parametrize(("name", "seconds"), [("checks", 330), ("speed", 380)])
def test_a_command_has_time_for_all_of_its_sections(name: str, seconds: float) -> None:
    command = COMMANDS[name]
    needed = sum(SECTIONS[section].budget_s for section in command.sections)
    assert command.seconds == seconds >= START_S + needed + (WRONG_S if name == "speed" else 0)


def test_every_section_is_run_by_one_command() -> None:
    run = [section for command in COMMANDS.values() for section in command.sections]
    assert sorted(run) == sorted(SECTIONS)


def test_a_command_ends_in_its_time_whatever_its_sections_may_take(tmp_path: Path) -> None:
    def hang(device: torch.device, smoke: bool, result: Result) -> None:
        time.sleep(30)

    path, start = tmp_path / "gpu.json", time.perf_counter()
    sections = {"one": Section(hang, 10), "two": Section(hang, 10)}
    quiet = Console(quiet=True)
    found = run_sections(sections, CPU, path, smoke=False, console=quiet, seconds=0.5)
    assert time.perf_counter() - start < 5
    assert not any(section["ok"] for section in found.values())


def test_a_command_ends_though_the_device_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[tuple[float, bool]] = []

    def arm(seconds: float, exit: bool) -> None:
        armed.append((seconds, exit))

    monkeypatch.setattr(faulthandler, "dump_traceback_later", arm)
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", armed.clear)
    found: list[tuple[float, bool]] = []

    def run(*_: Any, **__: Any) -> dict[str, Any]:
        found.extend(armed)
        return {}

    monkeypatch.setattr(run_all, "run_sections", run)
    main(["speed", "--device", "cpu", "--smoke", "--output", str(tmp_path)])
    assert found == [(4 * 380, True)]
    assert armed == []


def write_checks(folder: Path, faults: list[dict[str, Any]]) -> None:
    result = {"seed": 1, "faults": faults}
    content = {"sections": {"kernel_correctness": {"ok": not faults, "result": result}}}
    (folder / "gpu-checks-2026-01-02.json").write_text(json.dumps(content))


def test_a_wrong_kernel_goes_before_bandwidth_and_is_not_timed(tmp_path: Path) -> None:
    op = "swiglu"
    write_checks(tmp_path, [{"op": op, "width": CHECKED[op].widths[0]}])
    sections = after_checks({name: SECTIONS[name] for name in ("blocks", "bandwidth")}, tmp_path)
    assert list(sections) == ["blocks", "wrong_kernels", "bandwidth"]
    looked_at, timed = (run_one(tmp_path, sections[n]) for n in ("wrong_kernels", "bandwidth"))
    assert {error["op"] for error in looked_at["result"]["errors"]} == {op}
    assert {row["op"] for row in timed["result"]["rows"]} == set(TIMED) - {op}
    assert timed["result"]["untimed"] == [f"{op}: it computes wrong numbers"]


@pytest.mark.parametrize("is_there", [False, True], ids=["no checks", "no faults"])
def test_without_a_fault_nothing_goes_before_bandwidth(tmp_path: Path, is_there: bool) -> None:
    if is_there:
        write_checks(tmp_path, [])
    assert after_checks({"bandwidth": SECTIONS["bandwidth"]}, tmp_path) == {
        "bandwidth": SECTIONS["bandwidth"]
    }


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("Other", None)]
)
def test_the_peak_is_that_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
