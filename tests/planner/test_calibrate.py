"""A machine is measured, and the file that comes of it is one that the costs read."""

import time
from pathlib import Path

import pytest
import torch

from ilm_compile.cli.entry import main
from ilm_compile.cost import HARDWARE, Hardware, collective_time
from ilm_compile.errors import PlanError
from ilm_compile.planner import calibrate as calibration
from ilm_compile.planner.calibrate import best_seconds, calibrate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SECONDS", 0.01)


def test_the_command_writes_hardware(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "here.toml"
    assert main(["calibrate", "--output", str(path)]) == 0
    assert path.read_text() in capsys.readouterr().out
    here = Hardware.from_toml(path)
    assert here.name == "here"
    assert 1e9 < here.usable_flops(torch.float32) < 1e13
    assert here.peak_flops[torch.float64] > 1e8
    assert 1e8 < here.usable_bandwidth < 1e12
    assert 1e-7 < here.kernel_overhead_s < 1e-3
    assert 2**28 < here.memory_bytes < 2**45
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        few, many = (collective_time(kind, size, 2, here) for size in (2**12, 2**24))
        assert 1e-6 < few < many < 10


def test_of_a_gpu_the_peaks_stay_and_the_shares_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "gpu.toml"
    path.write_text(calibrate("gpu", "h100", CPU, num_processes=1))
    found, base = Hardware.from_toml(path), HARDWARE["h100"]
    assert found.peak_flops == base.peak_flops
    assert found.links == base.links
    assert 0 < found.efficiency.matmul < 0.1  # a processor is no H100


def test_the_least_of_several_calls_counts() -> None:
    waits = iter([0.0, *[0.02, 0.001, 0.02] * 1000])

    def run() -> None:
        torch.ones(1)
        end = time.perf_counter() + next(waits)
        while time.perf_counter() < end:
            pass

    assert best_seconds(run, CPU) == pytest.approx(0.001, rel=0.5)


def test_an_unknown_base_is_refused() -> None:
    with pytest.raises(PlanError, match="calibrate: base='abacus'; known are"):
        calibrate("x", "abacus", CPU)
