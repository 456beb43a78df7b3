"""A machine as a TOML file. Every key may be left out that `base`, a known machine, has.

name = "h100-slow-network"
base = "h100"
memory_gib = 80
memory_gb_per_s = 3350
reserved_gib = 3.6
kernel_overhead_us = 5
gpus_per_node = 8
cores = 8  # that the ranks of a machine share, where ranks are processes of a processor
shard_us = 500  # of the host for each unit that FSDP gathers or reduces, and for each parameter
shard_parameter_us = 20
nic_gb_per_s = 25
tflops = { bf16 = 989, fp32 = 67, fp64 = 67, fp8 = 1979 }
# what programs reach of the peak, and of the memory's bandwidth for what a product reads and writes
efficiency = { matmul = 0.7, attention = 0.18, operands = 2.3 }
# collective, ranks in the node: latency in us, GB/s, climb in ns per square root of a byte
links.all_reduce.8 = [15.4, 481, 6.5]
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ilm_compile.cost.constants import Efficiency
from ilm_compile.cost.hardware import GB, GIB, HARDWARE, Hardware
from ilm_compile.cost.links import Links, link
from ilm_compile.errors import PlanError

DTYPES = {
    "bf16": (torch.bfloat16, torch.float16),
    "fp32": (torch.float32,),
    "fp64": (torch.float64,),
    "fp8": (torch.float8_e4m3fn,),
}
# key -> field, and how the number becomes its unit
NUMBERS: Mapping[str, tuple[str, Callable[[float], float]]] = {
    "memory_gib": ("memory_bytes", lambda gib: int(gib * GIB)),
    "memory_gb_per_s": ("memory_bandwidth", lambda gb: gb * GB),
    "reserved_gib": ("reserved_bytes", lambda gib: int(gib * GIB)),
    "kernel_overhead_us": ("kernel_overhead_s", lambda us: us * 1e-6),
    "gpus_per_node": ("gpus_per_node", int),
    "cores": ("cores", int),
    "shard_us": ("shard_s", lambda us: us * 1e-6),
    "shard_parameter_us": ("shard_parameter_s", lambda us: us * 1e-6),
    "nic_gb_per_s": ("nic_bytes_per_s", lambda gb: gb * GB),
}
TABLES = ("tflops", "efficiency", "links")
NIC_SHARE, NIC_LATENCY_US = 0.8, 14  # as in `HARDWARE`


def read_hardware(path: Path) -> Hardware:
    """Return the machine; raises `PlanError` for a file, key or value that cannot be read."""
    try:
        given = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"cost: cannot read hardware from {path}: {error}") from error
    known = ("name", "base", *NUMBERS, *TABLES)
    for key in given:
        if key not in known:
            raise PlanError(f"cost: {path}: unknown key {key!r}; known are {', '.join(known)}")
    base = given.get("base", "h100")
    if base not in HARDWARE:
        raise PlanError(f"cost: {path}: base={base!r}; known are {', '.join(HARDWARE)}")
    start = HARDWARE[base]
    changes: dict[str, Any] = {"name": str(given.get("name", path.stem)), "path": str(path)}
    for key, (field, convert) in NUMBERS.items():
        if key in given:
            changes[field] = convert(_positive(path, key, given[key]))
    if "nic_gb_per_s" in given:
        changes["network"] = link(NIC_LATENCY_US, NIC_SHARE * given["nic_gb_per_s"])
    peaks = _table(path, given, "tflops", tuple(DTYPES))
    changes["peak_flops"] = {
        **start.peak_flops,
        **{dtype: 1e12 * peak for name, peak in peaks.items() for dtype in DTYPES[name]},
    }
    names = tuple(field.name for field in fields(Efficiency))
    shares = _table(path, given, "efficiency", names)
    changes["efficiency"] = replace(start.efficiency, **shares)
    changes["links"] = _links(path, given.get("links", {}), start.links)
    return replace(start, **changes)


def _positive(path: Path, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise PlanError(f"cost: {path}: {key} = {value!r}; expected a number above 0")
    return value


def _table(
    path: Path, given: Mapping[str, Any], name: str, known: tuple[str, ...]
) -> dict[str, float]:
    found = given.get(name, {})
    if not isinstance(found, dict) or not set(found) <= set(known):
        raise PlanError(f"cost: {path}: {name} = {found!r}; expected a table of {', '.join(known)}")
    return {key: _positive(path, f"{name}.{key}", value) for key, value in found.items()}


def _links(path: Path, given: Mapping[str, Any], start: Links) -> Links:
    links = {kind: dict(sizes) for kind, sizes in start.items()}
    for kind, sizes in given.items():
        if kind not in links or not isinstance(sizes, dict):
            raise PlanError(
                f"cost: {path}: links.{kind}; expected a table by size for one of "
                f"{', '.join(links)}"
            )
        for size, figures in sizes.items():
            where = f"links.{kind}.{size}"
            if not size.isdecimal() or not isinstance(figures, list) or len(figures) not in (2, 3):
                raise PlanError(
                    f"cost: {path}: {where} = {figures!r}; expected ranks = "
                    "[latency us, GB/s, ns per square root of a byte]"
                )
            latency, bandwidth, *climb = (float(figure) for figure in figures)
            _positive(path, where, bandwidth)
            links[kind][int(size)] = link(latency, bandwidth, *climb)
    return links
