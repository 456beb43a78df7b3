"""Kernels compiled ahead of time: what the compiler made of a sample, for an architecture."""

from typing import Any

from benchmarks.kernel_samples import SAMPLES
from tests.kernels.worker import Worker

ARCHITECTURES = (80, 90, 100)


def compile_sample(compiler: Worker, name: str, width: int, arch: int) -> Any:
    """The `Report` of `benchmarks.ahead_of_time` on the kernel that a sample launches first."""
    report, *_ = compiler.call("tests.kernels.aot:compile_here", name, width, arch)
    return report


def compile_here(name: str, width: int, arch: int) -> Any:
    """The reports on a sample's kernels, in this process, which must not interpret kernels."""
    from benchmarks.ahead_of_time import compile_kernels

    return compile_kernels(lambda: SAMPLES[name].call(width), arch)
