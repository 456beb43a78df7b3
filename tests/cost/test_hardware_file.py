"""A machine from a TOML file."""

from pathlib import Path

import pytest
import torch

import ilm_compile
from ilm_compile.cost import HARDWARE, Hardware, collective_time
from ilm_compile.cost.hardware import hardware_named
from ilm_compile.cost.sizes import ModelSizes
from ilm_compile.errors import PlanError
from ilm_compile.models import internlm2_tiny


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_what_is_left_out_is_the_base(tmp_path: Path) -> None:
    path = written(tmp_path, 'base = "h200"\nmemory_gib = 100\n')
    machine = Hardware.from_toml(path)
    assert machine.name == "mine"
    assert machine.memory_bytes == 100 * 2**30
    assert machine.memory_bandwidth == HARDWARE["h200"].memory_bandwidth


def test_every_figure_counts(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        name = "mine"
        memory_gb_per_s = 1000
        reserved_gib = 1
        kernel_overhead_us = 7
        gpus_per_node = 4
        nic_gb_per_s = 10
        cores = 6
        shard_us = 3
        shard_parameter_us = 0.5
        tflops = { bf16 = 100, fp32 = 50 }
        efficiency = { matmul = 0.5, operands = 2 }
        links.all_reduce.2 = [10, 100]
        """,
    )
    machine = hardware_named(str(path))
    assert machine.memory_bandwidth == 1e12
    assert machine.reserved_bytes == 2**30
    assert machine.kernel_overhead_s == pytest.approx(7e-6)
    assert machine.gpus_per_node == 4
    assert machine.peak_flops[torch.float16] == 100e12
    assert machine.peak_flops[torch.float32] == 50e12
    assert machine.efficiency.matmul == 0.5
    assert machine.efficiency.attention == HARDWARE["h100"].efficiency.attention
    assert machine.nic_bytes_per_s == 1e10
    assert machine.cores == 6
    assert machine.operand_bandwidth == pytest.approx(2 * 1e12 * 0.8)
    assert (machine.shard_s, machine.shard_parameter_s) == pytest.approx((3e-6, 5e-7))
    assert collective_time("all_reduce", 1e8, 2, machine) == pytest.approx(10e-6 + 1e-3)
    crossing = collective_time("p2p", 8e9, 2, machine, stride=4)
    assert crossing == pytest.approx(14e-6 + 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory_gb = 3", "unknown key 'memory_gb'; known are name, base, memory_gib"),
        ('base = "v100"', "base='v100'; known are a100-40g"),
        ("memory_gib = 0", "memory_gib = 0; expected a number above 0"),
        ('memory_gib = "80"', "memory_gib = '80'; expected a number above 0"),
        ("tflops = { int4 = 3 }", "tflops = .*; expected a table of bf16, fp32, fp64, fp8"),
        ("links.gossip.2 = [1, 2]", "links.gossip; expected a table by size for one of all_red"),
        ("links.p2p.2 = 3", "links.p2p.2 = 3; expected ranks = "),
        ("name =", "cannot read hardware from .*mine.toml: Invalid value"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Hardware.from_toml(written(tmp_path, text))


def test_a_name_that_is_neither_is_refused() -> None:
    with pytest.raises(PlanError, match="unknown hardware 'v100'; known are a100-40g"):
        hardware_named("v100")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read hardware from .*gone\.toml"):
        hardware_named(str(tmp_path / "gone.toml"))


def test_a_plan_whose_hardware_is_a_file_is_decided_by_that_machine(tmp_path: Path) -> None:
    small = written(tmp_path, 'base = "cpu"\nmemory_gib = 0.0049\nreserved_gib = 0.001\n')
    rows = {
        hardware: ilm_compile.partition(
            internlm2_tiny(), pp=2, num_microbatches=8, hardware=hardware, checkpoint="auto"
        )
        for hardware in ("cpu", str(small))
    }
    recomputed = [
        sum(region.recompute or region.selective for region in program.regions)
        for program in rows.values()
    ]
    assert recomputed[0] == 0 < recomputed[1]


def test_a_plan_that_is_found_for_a_file_names_it(tmp_path: Path) -> None:
    path = str(written(tmp_path, 'base = "h200"\nmemory_gib = 100\n'))
    sizes = ModelSizes(hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=128256)
    found = ilm_compile.search(sizes, 64, path, tokens_per_batch=4 * 2**20, seq=4096)
    assert found.plan.hardware == path
