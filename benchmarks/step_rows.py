"""Published training steps as rows of a CSV file: what each says of model, plan and machine.

The columns are `COLUMNS`. What a row leaves blank is taken from `BLANK`, and what it says in words
of its own from the tables below; each such choice is a note.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from ilm_compile.cost.constants import Software, software_named
from ilm_compile.cost.hardware import HARDWARE, Hardware
from ilm_compile.cost.sizes import ModelSizes, StepPlan
from ilm_compile.cost.step_memory import step_memory
from ilm_compile.cost.step_time import step_time
from ilm_compile.errors import IlmCompileError

SIZES = ("hidden", "layers", "heads", "kv_heads", "ffn", "ffn_matrices", "vocab")
COLUMNS = (
    *("id", "source", *SIZES, "seq", "gpu", "gpus_per_node", "n_gpus", "tp", "pp", "chunks", "dp"),
    *("micro_batch", "global_batch", "recompute", "zero", "sequence_parallel", "schedule"),
    "precision",
)
BLANK = {
    "ffn_matrices": "2",
    "gpus_per_node": "8",
    "tp": "1",
    "pp": "1",
    "chunks": "1",
    "micro_batch": "1",
    "recompute": "selective",
    "sequence_parallel": "no",
    "schedule": "1f1b",
    "precision": "bf16",
}
# No row says what program ran; its source does.
SOURCES = {
    "vtrain": "megatron-deepspeed",
    "mosaicml/llm-foundry": "llm-foundry",
    "internevo": "internevo",
    "torchtitan": "torchtitan",
    "narayanan": "megatron",
    "korthikanti": "megatron",
    "zerobubble": "megatron",
    "megascale": "megatron",
}
SCHEDULES = {
    "1f1b": "1f1b",
    "gpipe": "gpipe",
    "1f1b-i": "interleaved_1f1b",
    "interleaved": "interleaved_1f1b",
    "zb-1p": "zb_1p",
    "zb-2p": "zb_2p",
    "zb-h1": "zb_h1",
    "zb-h2": "zb_h2",
    "zb-v": "zb_v",
}
PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "fp8": "fp8", "amp_fp8": "fp8"}
RECOMPUTE = {"none": "none", "no": "none", "full": "full", "yes": "full", "selective": "selective"}


class RowError(IlmCompileError):
    """A row that says too little, or what cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One row. seconds, gigabytes (of 2**30 bytes): as measured, None where not published."""

    id: str
    source: str
    model: str
    sizes: ModelSizes
    plan: StepPlan
    hardware: Hardware
    software: Software
    seconds: float | None
    gigabytes: float | None
    notes: tuple[str, ...] = ()

    @property
    def predicted_s(self) -> float:
        """The seconds that are predicted."""
        return step_time(self.sizes, self.plan, self.hardware, self.software).total

    @property
    def predicted_gb(self) -> float:
        """The gigabytes that are predicted of the fullest rank."""
        return step_memory(self.sizes, self.plan, self.software).total / 2**30


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows; raises `RowError` for a file without a column of `COLUMNS`."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise RowError(f"{path}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
        return [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]


def read_step(row: Mapping[str, str]) -> Step:
    """Return what a row says; raises `RowError`, `PlanError` for what cannot be made sense of."""
    notes: list[str] = []
    cells = {**row, **dict(_filled(row, notes))}
    if not cells["kv_heads"]:
        cells["kv_heads"] = cells["heads"]
    sizes = ModelSizes(**{name: _integer(cells, name) for name in SIZES})
    zero, zero_group = _zero(cells["zero"], notes)
    dp = _data_parallel(cells, notes)
    schedule = _word(cells, "schedule", SCHEDULES, notes)
    pp = _integer(cells, "pp")
    chunks = _chunks(cells, sizes.layers, pp)
    if schedule == "1f1b" and chunks > 1:
        schedule = "interleaved_1f1b"
    micro_batch = _number(cells, "micro_batch")
    plan = StepPlan(
        seq=_integer(cells, "seq"),
        micro_batch=micro_batch,
        num_microbatches=max(1.0, _number(cells, "global_batch") / (dp * micro_batch)),
        tp=_integer(cells, "tp"),
        pp=pp,
        dp=dp,
        chunks=chunks,
        schedule=schedule,
        recompute=_word(cells, "recompute", RECOMPUTE, notes),
        zero=zero,
        zero_group=min(zero_group, dp),
        sequence_parallel=cells["sequence_parallel"].lower() in ("yes", "true", "1"),
        precision=_word(cells, "precision", PRECISIONS, notes),
    )
    return Step(
        id=cells["id"],
        source=cells["source"],
        model=cells.get("model", ""),
        sizes=sizes,
        plan=plan,
        hardware=_hardware(cells),
        software=_software(cells, notes),
        seconds=float(cells["step_s"]) if cells.get("step_s") else None,
        gigabytes=float(cells["memory_gb"]) if cells.get("memory_gb") else None,
        notes=tuple(notes),
    )


def _filled(row: Mapping[str, str], notes: list[str]) -> Iterator[tuple[str, str]]:
    for name, value in BLANK.items():
        if not row[name]:
            if name != "sequence_parallel":
                notes.append(f"{name} is blank, taken as {value}")
            yield name, value


def _number(cells: Mapping[str, str], name: str) -> float:
    try:
        value = float(cells[name])
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise RowError(f"{name}={cells[name]!r}; expected a number above 0")
    return value


def _integer(cells: Mapping[str, str], name: str) -> int:
    value = _number(cells, name)
    if value != int(value):
        raise RowError(f"{name}={cells[name]!r}; expected a whole number")
    return int(value)


def _word(cells: Mapping[str, str], name: str, table: Mapping[str, str], notes: list[str]) -> str:
    """The first word of a cell by its table, else what a blank one would be."""
    word = cells[name].lower().split()[0]
    if word not in table:
        notes.append(f"{name} {cells[name]!r} is not known, taken as {BLANK[name]}")
    return table.get(word, table[BLANK[name]])


def _chunks(cells: Mapping[str, str], layers: int, pp: int) -> int:
    """A number, or as many layers as a chunk has."""
    match = re.fullmatch(r"(\d+) layers?/chunk", cells["chunks"])
    return ceil(layers / pp / int(match[1])) if match else _integer(cells, "chunks")


def _data_parallel(cells: Mapping[str, str], notes: list[str]) -> int:
    gpus, model = _integer(cells, "n_gpus"), _integer(cells, "tp") * _integer(cells, "pp")
    if gpus % model:
        raise RowError(f"n_gpus={gpus} is not a multiple of tp * pp = {model}")
    if cells["dp"] and _integer(cells, "dp") != gpus // model:
        notes.append(f"dp={cells['dp']}, taken as n_gpus / (tp * pp) = {gpus // model}")
    return gpus // model


def _zero(text: str, notes: list[str]) -> tuple[int, int]:
    """The stage, and among how many ranks (0: all)."""
    match = re.search(r"zero(\d)(?:=(-?\d+))?", text.lower())
    if match and int(match[1]) <= 3:
        return int(match[1]), max(0, int(match[2] or 0))
    if text in ("0", "1", "2", "3"):
        return int(text), 0
    stage = 3 if "fsdp" in text.lower() else 1
    notes.append(f"zero {text!r}, taken as zero{stage}")
    return stage, 0


def _hardware(cells: Mapping[str, str]) -> Hardware:
    name = cells["gpu"].lower()
    if name not in HARDWARE:
        raise RowError(f"gpu={cells['gpu']!r} is not known; known are {', '.join(HARDWARE)}")
    return replace(HARDWARE[name], gpus_per_node=_integer(cells, "gpus_per_node"))


def _software(cells: Mapping[str, str], notes: list[str]) -> Software:
    source = cells["source"].lower()
    for prefix, name in SOURCES.items():
        if source.startswith(prefix):
            return software_named(name)
    name = "llm-foundry" if "fsdp" in cells["zero"].lower() else "megatron"
    notes.append(f"source {cells['source']!r} is not known, taken to run {name}")
    return software_named(name)
