"""Compiles Triton kernels for GPUs that are not there, as their launchers would launch them.

The launcher runs on CPU tensors with a driver in place that claims a GPU, so signature, alignment
hints, constexprs and options are those of a real launch; only the launch itself is left out. Triton
brings ptxas and cuobjdump along. A process that interprets kernels (TRITON_INTERPRET=1) cannot
compile any: the interpreter replaces parts of triton.language for good.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

WORD_BYTES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "u16": 2, "u32": 4, "u64": 8, "f32": 4}
WIDEST = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the compiler made of one kernel.

    arch: compute capability without its dot. registers: per thread. spilled: bytes of local memory
    a thread needs. shared: bytes a program needs. widest_load: bytes of the widest load from global
    memory, asynchronous copies included; narrow_loads and narrow_stores: how many instructions move
    fewer than 16 bytes a thread; narrowest: the bytes of the one that moves fewest. async_copies:
    cp.async instructions, the mark of a pipelined loop. float64: instructions on 64-bit floats.
    barriers: at which the warps of a program wait.
    """

    kernel: str
    arch: int
    warps: int
    registers: int
    spilled: int
    shared: int
    widest_load: int
    narrow_loads: int
    narrow_stores: int
    narrowest: int
    async_copies: int
    float64: int
    barriers: int


class _Driver(DriverBase):  # type: ignore[misc]
    """A driver of a GPU of one architecture that nothing can run on."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # the key of a kernel's cache, so that architectures do not mix

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError("no such GPU")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("no such GPU")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("no such GPU")


def compile_kernels(launcher: Callable[[], Any], arch: int) -> list[Report]:
    """The kernels that a call of `launcher` compiles, in order; one it launches again counts once.

    launcher: calls launchers of ilm_compile.kernels on CPU tensors. What they return is undefined.
    """
    compiled: dict[int, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled[id(kernel)] = kernel
        return kernel

    with _claimed_gpu(arch), mock.patch.object(JITFunction, "run", compile_only):
        launcher()
    return [_report(kernel, arch) for kernel in compiled.values()]


@contextmanager
def _claimed_gpu(arch: int) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        driver._active = before


def _report(kernel: Any, arch: int) -> Report:
    ptx: str = kernel.asm["ptx"]
    loads = [_width(found) for found in re.findall(r"\bld\.global\S*", ptx)]
    stores = [_width(found) for found in re.findall(r"\bst\.global\S*", ptx)]
    copies = [
        int(size, 0) for size in re.findall(r"\bcp\.async\.c[ag]\S*[^,;]*,[^,;]*,\s*(\w+)", ptx)
    ]
    usage = _resource_usage(kernel.asm["cubin"])
    return Report(
        kernel=kernel.metadata.name,
        arch=arch,
        warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        spilled=max(usage["LOCAL"], usage["STACK"]),
        shared=kernel.metadata.shared,
        widest_load=max([*loads, *copies], default=0),
        narrow_loads=sum(width < WIDEST for width in [*loads, *copies]),
        narrow_stores=sum(width < WIDEST for width in stores),
        narrowest=min([*loads, *copies, *stores], default=0),
        async_copies=len(copies),
        float64=len(re.findall(r"\.f64\b", ptx)),
        barriers=len(re.findall(r"\bbar(?:rier)?\.", ptx)),
    )


def _width(instruction: str) -> int:
    """Bytes a thread moves: `ld.global.v4.b32` moves 16."""
    *_, last = instruction.split(".")
    vector = re.search(r"\.v(\d)\b", instruction)
    return WORD_BYTES[last] * (int(vector[1]) if vector else 1)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of a kernel: REG, STACK, SHARED, LOCAL."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
