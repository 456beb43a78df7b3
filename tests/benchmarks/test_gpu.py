"""The script for GPU machines, run on the CPU at tiny sizes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.gpu.blocks import peak_flops
from benchmarks.gpu.failure import OutOfTime, SectionError
from benchmarks.gpu.ops import CHECKED, TIMED
from benchmarks.gpu.run_all import SECTIONS, Section, main, run_sections, time_limit

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
    expected = [(op, d, n) for op in TIMED for n in (16, 32) for d in ("forward", "backward")]
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


def test_a_failing_section_is_recorded(tmp_path: Path) -> None:
    def fail(device: torch.device, smoke: bool) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    found = run_one(tmp_path, Section(fail, 10))
    assert not found["ok"]
    assert found["error"].splitlines()[-1] == "RuntimeError: no such kernel"


def test_a_section_with_faults_keeps_its_figures(tmp_path: Path) -> None:
    def fail(device: torch.device, smoke: bool) -> dict[str, Any]:
        raise SectionError("one fault", {"error": 2.0})

    found = run_one(tmp_path, Section(fail, 10))
    assert (found["ok"], found["error"], found["result"]) == (False, "one fault", {"error": 2.0})


def test_a_section_that_hangs_is_stopped_whatever_it_catches(tmp_path: Path) -> None:
    def hang(device: torch.device, smoke: bool) -> dict[str, Any]:
        while True:
            try:
                time.sleep(30)
            except Exception:
                continue

    found = run_one(tmp_path, Section(hang, 0.1))
    assert "longer than its budget of 0.4 s" in found["error"]
    assert found["seconds"] < 5


def test_the_time_limit_leaves_no_alarm_behind() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(OutOfTime), time_limit(0.05):
        time.sleep(5)


def test_the_budgets_fit_in_eight_minutes() -> None:
    assert sum(section.budget_s for section in SECTIONS.values()) < 480


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("Other", None)]
)
def test_the_peak_is_that_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
