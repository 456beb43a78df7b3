"""A machine is measured, and the file that comes of it is one that the costs read."""

import os
import time
from pathlib import Path

import pytest
import torch

from ilm_compile.cli.entry import main
from ilm_compile.cost import HARDWARE, Hardware, collective_time
from ilm_compile.errors import PlanError
from ilm_compile.planner import rates
from ilm_compile.planner.calibrate import calibrate
from ilm_compile.planner.rates import usual_seconds

CPU = torch.device("cpu")


def test_the_command_writes_hardware(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "here.toml"
    assert main(["calibrate", "--output", str(path), "--seconds", "0.01"]) == 0
    assert path.read_text() in capsys.readouterr().out
    here = Hardware.from_toml(path)
    assert here.name == "here"
    assert 1e9 < here.usable_flops(torch.float32) < 1e13
    assert here.peak_flops[torch.float64] > 1e8
    assert 1e8 < here.usable_bandwidth < 1e12
    assert 1e-7 < here.kernel_overhead_s < 1e-3
    assert here.operand_bandwidth > 1e9
    assert 0 < here.shard_s + here.shard_parameter_s < 0.1
    assert here.cores == os.cpu_count()
    assert 0 < here.attention_flops(torch.float32) < here.usable_flops(torch.float32)
    assert 2**28 < here.memory_bytes < 2**45
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"):
        few, many = (collective_time(kind, size, 2, here) for size in (2**12, 2**24))
        assert 1e-6 < few < many < 10


def test_of_a_gpu_the_peaks_stay_and_the_shares_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "gpu.toml"
    path.write_text(calibrate("gpu", "h100", CPU, num_processes=1, seconds=0.01))
    found, base = Hardware.from_toml(path), HARDWARE["h100"]
    assert found.peak_flops == base.peak_flops
    assert found.links == base.links
    assert 0 < found.efficiency.matmul < 0.1  # a processor is no H100


def test_the_middle_of_several_calls_counts() -> None:
    waits = iter([0.0, *[0.02, 0.004, 0.001] * 1000])

    def run() -> None:
        torch.ones(1)
        end = time.perf_counter() + next(waits)
        while time.perf_counter() < end:
            pass

    assert usual_seconds(run, CPU, 0.03) == pytest.approx(0.004, rel=0.5)


def test_an_unknown_base_is_refused() -> None:
    with pytest.raises(PlanError, match="calibrate: base='abacus'; known are"):
        calibrate("x", "abacus", CPU)


def test_products_are_told_from_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter(
        (2 * m * k * n, 4 * (m * k + k * n + m * n)) for m, k, n in rates.PRODUCTS for _ in range(3)
    )

    def seconds(*_: object) -> float:
        flops, num_bytes = next(sizes)
        return flops / 1e11 + num_bytes / 2e10

    monkeypatch.setattr(rates, "usual_mean", seconds)
    assert rates.product_rates(0.01) == pytest.approx((1e11, 2e10))


def test_a_blocks_ops_are_what_its_time_leaves_over(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rates.BLOCKS * 0.1
    monkeypatch.setattr(rates, "usual_seconds", lambda *arguments: whole)
    endless = {"fp32": 1e30, "tile": 1e30, "attention": 1e30, "bytes": 1e30}
    tokens, width = rates.ROWS * rates.TOKENS, rates.WIDTH
    products = 2 * tokens * width**2 * (1 + 1 + 4 + 2)
    assert rates.launch_seconds(CPU, 0.01, endless) == pytest.approx(0.1 / (2 * rates.BLOCK_OPS))
    known = rates.launch_seconds(CPU, 0.01, {**endless, "fp32": 3 * products / 0.04})
    assert known == pytest.approx(0.06 / (2 * rates.BLOCK_OPS))
