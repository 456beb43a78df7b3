"""Every Triton kernel, compiled for the GPUs it is meant for, with no GPU.

Compiled from a real call of its launcher: a change that narrows loads, spills registers, computes
in float64, loses the prefetch of a loop or does not fit as often as its table says is found here.
"""

from unittest import mock

import pytest
import torch

from benchmarks.kernel_samples import SAMPLES
from ilm_compile.kernels.launch import Launch
from ilm_compile.kernels.library import LAUNCHERS
from tests.kernels.aot import ARCHITECTURES, compile_sample
from tests.kernels.worker import Worker

CASES = [
    (name, width, arch)
    for name, sample in SAMPLES.items()
    for width in sample.widths
    for arch in ARCHITECTURES
]
# What the programs of a multiprocessor share, in bytes, by compute capability.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize(("name", "width", "arch"), CASES)
def test_compiled_kernel(compiler: Worker, name: str, width: int, arch: int) -> None:
    report = compile_sample(compiler, name, width, arch)
    assert report.spilled == 0
    assert report.float64 == 0
    assert (report.async_copies > 0) == SAMPLES[name].prefetches(width)
    launch = SAMPLES[name].launch(width)
    if launch is not None and launch.pieces > 1:
        assert report.narrowest == min(16, side_by_side(launch))
        assert report.widest_load == min(16, 2 * side_by_side(launch))  # of float32
    else:
        assert report.widest_load == 16
        assert report.narrow_loads == SAMPLES[name].narrow_loads
        assert report.narrow_stores == SAMPLES[name].narrow_stores
    if launch is not None:
        assert report.warps == launch.warps
        assert report.registers * 32 * launch.warps * launch.programs_per_sm <= 65536
        assert report.shared * launch.programs_per_sm <= SHARED_BYTES[arch]


def side_by_side(launch: Launch) -> int:
    """Bytes of the 16-bit numbers of a piece that a thread has."""
    return 2 * launch.block * launch.rows // (32 * launch.warps)


def test_every_launcher_has_a_sample() -> None:
    sampled = {f"ilm_compile.kernels.{sample.launcher}" for sample in SAMPLES.values()}
    assert set(LAUNCHERS.values()) <= sampled


@pytest.mark.parametrize("name", ["add_rms_norm_backward", "add_rms_norm", "swiglu_backward"])
def test_a_width_of_eights_keeps_wide_loads(compiler: Worker, name: str) -> None:
    # Triton knows of an argument only whether 16 divides it, so the stride must not be one.
    report = compile_sample(compiler, name, 3080, 90)
    assert report.narrow_loads == report.narrow_stores == 0


@pytest.mark.parametrize(("name", "most"), [("rms_norm_backward", 5), ("add_rms_norm_backward", 6)])
def test_the_warps_of_a_row_meet_once_for_both_of_its_sums(
    compiler: Worker, name: str, most: int
) -> None:
    assert compile_sample(compiler, name, 4096, 90).barriers <= most  # 8 and 9, one by one


def count_compilations(name: str, num_rows: list[int]) -> int:
    from benchmarks import kernel_samples
    from benchmarks.ahead_of_time import compile_kernels

    def launch_all() -> None:
        for rows in num_rows:
            with mock.patch.object(kernel_samples, "NUM_ROWS", rows):
                SAMPLES[name].call(SAMPLES[name].widths[0])

    return len(compile_kernels(launch_all, 90))


# A slice of one row is a row end to end: one more layout, not one more per number of rows.
@pytest.mark.parametrize("name", [name for name in SAMPLES if "halves" not in name])
def test_no_number_of_rows_compiles_anew(compiler: Worker, name: str) -> None:
    # 1 and multiples of 16 are what Triton specialises on
    target = "tests.kernels.test_ahead_of_time:count_compilations"
    kernels = compiler.call(target, name, [5])
    assert compiler.call(target, name, [1, 5, 16, 1000, 4096]) == kernels


def test_new_tensors_are_poisoned(compiler: Worker) -> None:
    assert compiler.call("torch:empty", 3).isnan().all()
    assert not torch.empty(3).isnan().all()
