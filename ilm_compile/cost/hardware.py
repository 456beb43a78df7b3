"""The machines that costs are computed for: `HARDWARE`, by name.

A figure is what the datasheet says; what a program can use of it is the figure times an efficiency.
Sources: bf16 peak, memory and NIC figures and the memory efficiency of 0.8 are those of
ai-dynamo/aiconfigurator (src/aiconfigurator/systems/*.yaml), the float32 and float64 peaks those of
NVIDIA's datasheets (float32 without TF32, as torch's default), as are all figures of the A100 40GB,
of the A800 (an A100 with two thirds of its NVLinks), the HGX B200 and the GB200 NVL72, whose memory
is as nvidia-smi reports it and whose links are taken to be the H100's at twice the bandwidth
(NVLink at 1.8 instead of 0.9 TB/s). These were compared with pages that quote the datasheets: B200
verda.com/blog/gb300-nvl72-architecture (2.25 PFLOP/s, 75 TFLOP/s, 7.7 TB/s, 180 GB; 179 GiB by
docs.vultr.com), GB200 glennklockwood.com/garden/processors/B200 (2.5 PFLOP/s, 8 TB/s), A800
aiwiki.ai/wiki/nvidia_a800 (NVLink at 400 instead of 600 GB/s, the rest as the A100's). What
programs reach of the peaks is fitted: see `ilm_compile.cost.constants`. 5 us per kernel fit
NVIDIA's measured bf16 GEMMs. Between nodes: one NIC per GPU at 0.8 of its line rate, and the
latency of one network step of NCCL's Simple protocol (NVIDIA/nccl, src/graph/tuning.cc).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ilm_compile.cost.constants import AMPERE, HOPPER, Efficiency
from ilm_compile.cost.links import A100, GLOO, H100, H200, Link, Links, faster, interpolate, link
from ilm_compile.errors import PlanError

GB = 1e9
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One device, and how it is connected to others of its kind.

    Units: FLOP/s, bytes/s, bytes, seconds. `kernel_overhead_s` is added to every kernel,
    `reserved_bytes` is the memory that CUDA, NCCL and the allocator take from the program. `links`
    are inside a node, `network` is from one device to a device of another node, which has a NIC of
    `nic_bytes_per_s`. `efficiency` is that of a program's steps. `cores` are what the ranks of a
    machine share, where ranks are processes of a processor: its figures are what programs reach.
    `shard_s`, `shard_parameter_s`: what the host takes for an FSDP unit and for each parameter of
    it, to gather or to reduce it, beside the collective; a GPU hides it.
    `path` is the file that describes it, None for a row of the table.
    """

    name: str
    peak_flops: Mapping[torch.dtype, float] = field(hash=False)
    memory_bandwidth: float
    memory_bytes: int
    reserved_bytes: int
    kernel_overhead_s: float
    links: Links = field(hash=False, repr=False)
    network: Link
    nic_bytes_per_s: float
    gpus_per_node: int
    efficiency: Efficiency
    memory_efficiency: float = 0.8
    cores: int = 0
    path: str | None = None
    shard_s: float = 0.0
    shard_parameter_s: float = 0.0

    def usable_flops(self, dtype: torch.dtype) -> float:
        """Return the FLOP/s a large matrix product reaches; raises `PlanError` for other dtypes."""
        if dtype not in self.peak_flops:
            known = ", ".join(str(known) for known in self.peak_flops)
            raise PlanError(f"cost: no peak FLOP/s of {self.name} for {dtype}; known: {known}")
        return self.peak_flops[dtype] * self.efficiency.matmul

    def attention_flops(self, dtype: torch.dtype) -> float:
        """Return the FLOP/s of fused attention, as `usable_flops` does of a product."""
        return self.usable_flops(dtype) * self.efficiency.attention / self.efficiency.matmul

    @property
    def operand_bandwidth(self) -> float:
        """The bytes/s of what a product reads and writes beside its arithmetic."""
        return self.usable_bandwidth * self.efficiency.operands

    @property
    def usable_bandwidth(self) -> float:
        """The bytes/s a large kernel reads and writes."""
        return self.memory_bandwidth * self.memory_efficiency

    @property
    def usable_bytes(self) -> int:
        """The bytes of memory a program can fill."""
        return self.memory_bytes - self.reserved_bytes

    @classmethod
    def from_toml(cls, path: Path) -> Hardware:
        """Return the machine that a file describes: see `ilm_compile.cost.hardware_file`."""
        from ilm_compile.cost.hardware_file import read_hardware

        return read_hardware(path)

    def link(self, kind: str, size: int) -> Link:
        """Return the link of collective `kind` among `size` devices of one node."""
        return interpolate(self.links[kind], size)


def _gpu(
    name: str,
    tflops: tuple[float, float, float],
    hbm: float,
    gib: int,
    links: Links,
    nic: float,
    efficiency: Efficiency,
    *,
    fp8: float | None = None,
    gpus_per_node: int = 8,
) -> Hardware:
    """A GPU. `tflops` in 16 bits, float32, float64; `hbm`, `nic` in 1e9 bytes/s."""
    half, single, double = (1e12 * peak for peak in tflops)
    return Hardware(
        name=name,
        peak_flops={
            torch.bfloat16: half,
            torch.float16: half,
            torch.float32: single,
            torch.float64: double,
            **({torch.float8_e4m3fn: 1e12 * fp8} if fp8 else {}),
        },
        memory_bandwidth=hbm * GB,
        memory_bytes=gib * GIB,
        reserved_bytes=int(3.89 * GB),
        kernel_overhead_s=5e-6,
        links=links,
        network=link(14, 0.8 * nic),
        nic_bytes_per_s=nic * GB,
        gpus_per_node=gpus_per_node,
        efficiency=efficiency,
    )


# One core of a laptop per process. Measured: gloo, 50 GFLOP/s per core in float32, 10 GB/s of
# memory, 2 us per eager op. Assumed: gigabit Ethernet between machines, half the speed in float64,
# none gained in 16 bits.
_CPU = Hardware(
    name="cpu",
    peak_flops={
        torch.bfloat16: 50e9,
        torch.float16: 50e9,
        torch.float32: 50e9,
        torch.float64: 25e9,
    },
    memory_bandwidth=10 * GB,
    memory_bytes=4 * GIB,
    reserved_bytes=GIB // 2,
    kernel_overhead_s=2e-6,
    links=GLOO,
    network=link(200, 0.125),
    nic_bytes_per_s=0.125 * GB,
    gpus_per_node=8,
    efficiency=Efficiency(matmul=1.0, attention=0.5),
    memory_efficiency=1.0,
    cores=8,
)

HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _gpu("a100-40g", (312, 19.5, 19.5), 1555, 40, A100, 25, AMPERE),
        _gpu("a100-80g", (312, 19.5, 19.5), 2039, 80, A100, 25, AMPERE),
        _gpu("a800", (312, 19.5, 19.5), 2039, 80, faster(A100, 2 / 3), 25, AMPERE),
        _gpu("h100", (989, 67, 67), 3350, 80, H100, 50, HOPPER, fp8=1979),
        _gpu("h200", (989, 67, 67), 4800, 141, H200, 50, HOPPER, fp8=1979),
        _gpu("b200", (2250, 75, 37), 7700, 179, faster(H100, 2), 50, HOPPER, fp8=4500),
        _gpu(
            *("gb200", (2500, 80, 40), 8000, 185, faster(H100, 2), 50, HOPPER),
            fp8=5000,
            gpus_per_node=72,
        ),
        _CPU,
    )
}


def hardware_named(name: str) -> Hardware:
    """Return a row of `HARDWARE`, or what the TOML file of that path describes.

    Raises `PlanError` naming the rows if it is neither.
    """
    if name in HARDWARE:
        return HARDWARE[name]
    if name.endswith(".toml"):
        return Hardware.from_toml(Path(name))
    raise PlanError(
        f"cost: unknown hardware {name!r}; known are {', '.join(HARDWARE)}, or the path of a "
        ".toml file"
    )
