"""How long the compiler itself takes: models of real size, on the meta device, in one process.

    python -m benchmarks.partition_time

Each case runs in a process of its own, because peak memory is of a process. `seconds` are wall
time, `cpu_seconds` processor time of the whole process: on a machine with other work the second is
what an idle one would need.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import ilm_compile.partitioning
from benchmarks.common import dated, make_model, make_parser, save_json, show_table, words_of
from ilm_compile.passes import shard

SEQ = 4096
# What is timed on its own: part -> where `partition` finds the function.
PARTS: dict[str, tuple[Any, str]] = {
    "trace": (ilm_compile.partitioning, "trace"),
    "solve": (shard, "solve"),
    "apply": (shard.Shard, "apply"),
}


def llama(**config: Any) -> nn.Module:
    """A Hugging Face Llama on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(max_position_embeddings=SEQ, **config))


def llama_7b() -> nn.Module:
    """Llama-2-7B."""
    return llama(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    )


def llama_70b() -> nn.Module:
    """Llama-3-70B."""
    return llama(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )


def internlm2_7b() -> nn.Module:
    """InternLM2-7B, our own model."""
    return make_model("internlm2_7b", {"max_seq_len": SEQ})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, a plan, and goals in seconds by part."""

    name: str
    model: Callable[[], nn.Module]
    plan: dict[str, Any]
    goals: dict[str, float]


CASES = (
    Case(name="Llama 7B", model=llama_7b, plan={"tp": 8}, goals={"solve": 2.0, "whole": 15.0}),
    Case(name="Llama 70B", model=llama_70b, plan={"tp": 8}, goals={"solve": 2.0, "whole": 40.0}),
    Case(name="InternLM2 7B", model=internlm2_7b, plan={"tp": 8, "pp": 4}, goals={"solve": 2.0}),
)


@dataclass
class Stopwatch:
    """Adds up the time of the functions in `PARTS` while it runs."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time until the block ends to `part`."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        for times, passed in (
            (self.seconds, time.perf_counter() - wall),
            (self.cpu_seconds, time.process_time() - cpu),
        ):
            times[part] = times.get(part, 0.0) + passed

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure every call of the functions in `PARTS` until the block ends."""
        with ExitStack() as stack:
            for part, (owner, name) in PARTS.items():
                timed = self.measure(part)(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield


def measure(model: nn.Module, plan: dict[str, Any], seq: int = SEQ) -> dict[str, Any]:
    """Partition `model` for one sequence per micro-batch; returns times, nodes and memory."""
    inputs = {name: ((1, seq), torch.int64) for name in ("input_ids", "labels")}
    watch = Stopwatch()
    with watch.watch(), watch.measure("whole"):
        program = ilm_compile.partition(model, example_inputs=inputs, **plan)
    for times in (watch.seconds, watch.cpu_seconds):
        times["rewrite"] = times.pop("apply") - times["solve"]
    return {
        "seconds": {part: round(value, 3) for part, value in watch.seconds.items()},
        "cpu_seconds": {part: round(value, 3) for part, value in watch.cpu_seconds.items()},
        "nodes": len(program.graph.nodes),
        # Linux counts in KiB
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
    }


def run_case(index: int) -> dict[str, Any]:
    """Measure one of `CASES` in this process."""
    torch.set_num_threads(1)
    case = CASES[index]
    figures = measure(case.model(), case.plan)
    return {"name": case.name, "plan": case.plan, "seq": SEQ, "goals": case.goals, **figures}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the figures; a time that misses its goal is marked."""
    parts = ("trace", "solve", "rewrite", "whole")
    lines = []
    for row in rows:
        missed = {part for part, goal in row["goals"].items() if row["seconds"][part] > goal}
        times = (f"{row['seconds'][part]:.2f}{' !' * (part in missed)}" for part in parts)
        facts = f"{row['cpu_seconds']['whole']:.2f}", row["nodes"], f"{row['peak_memory_gb']:.2f}"
        lines.append((f"{row['name']}, {words_of(row['plan'])}", *times, *facts))
    title = f"partition on the meta device, {SEQ} tokens: seconds"
    show_table(title, ("model, plan", *parts, "processor", "nodes", "peak GB"), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("partition_time", __doc__)
    parser.add_argument("--output", type=Path, default=dated("partition-time"))
    options = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    rows = []
    for index in range(len(CASES)):
        with context.Pool(1) as pool:
            rows.append(pool.apply(run_case, (index,)))
    show(rows)
    save_json(options.output, {"cases": rows})
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
