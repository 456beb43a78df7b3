"""The script for GPU machines, run on the CPU at tiny sizes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.gpu.run_all import SECTIONS, Section, main, run_sections, time_limit
from benchmarks.gpu.throughput import peak_flops

CPU = torch.device("cpu")


def run_one(tmp_path: Path, section: Section) -> dict[str, Any]:
    path = tmp_path / "gpu.json"
    run_sections({"one": section}, CPU, path, smoke=True, console=Console(quiet=True))
    found: dict[str, Any] = json.loads(path.read_text())["sections"]["one"]
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the script refuses the CPU beside a GPU")
def test_all_sections_run_on_the_cpu(tmp_path: Path) -> None:
    chosen = [f"--only={name}" for name in SECTIONS if name != "gpu_tests"]
    main(["--device", "cpu", "--smoke", "--output", str(tmp_path), *chosen])
    (path,) = tmp_path.glob("gpu-*.json")
    written = json.loads(path.read_text())
    assert {name: section["ok"] for name, section in written["sections"].items()} == {
        name: True for name in SECTIONS if name != "gpu_tests"
    }
    assert written["circumstances"]["torch"] == torch.__version__
    errors = written["sections"]["equality"]["result"]["relative_errors"]
    assert len(errors) == 6
    speed = written["sections"]["throughput"]["result"]["compiled"]
    assert speed["tokens_per_second"] == pytest.approx(2 * 16 / speed["step_time_s"])
    assert speed["busiest_ops"]


def test_a_failing_section_is_recorded(tmp_path: Path) -> None:
    def fail(device: torch.device, smoke: bool) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    found = run_one(tmp_path, Section(fail, 10))
    assert not found["ok"]
    assert found["error"].splitlines()[-1] == "RuntimeError: no such kernel"


def test_a_section_that_hangs_is_stopped(tmp_path: Path) -> None:
    def hang(device: torch.device, smoke: bool) -> dict[str, Any]:
        time.sleep(30)
        return {}

    found = run_one(tmp_path, Section(hang, 0.1))
    assert "longer than its budget of 0.1 s" in found["error"]
    assert found["seconds"] < 5


def test_the_time_limit_leaves_no_alarm_behind() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.1)


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
