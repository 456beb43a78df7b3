"""Tokens per second of InternLM2-1.8B's blocks in bf16: compiled, and eager in two ways.

All train with AdamW on float32 or bf16 weights as named, in one run and in turn. MFU is the model's
FLOPs (`ilm_compile.cost.model_flops`, nothing computed twice, causal attention at half) over the
peak of the GPU in bf16.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import ilm_compile
from benchmarks.common import make_model, random_batch
from ilm_compile.cost import HARDWARE
from ilm_compile.runtime import adamw

# Vocabulary and number of blocks are cut so that three copies with their optimizers fit in 80 GB.
SIZES = {"num_layers": 8, "vocab_size": 32000}
SMOKE_SIZES = {
    **{"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 512},
    "num_kv_attention_heads": 4,
}
LEARNING_RATE = 1e-5

Step = Callable[[dict[str, Tensor]], object]


def throughput(device: torch.device, smoke: bool) -> dict[str, Any]:
    """Median step time, tokens/s, MFU and peak memory of each; and what takes the GPU's time."""
    sizes, rows, seq_len = (SMOKE_SIZES, 2, 16) if smoke else (SIZES, 2, 4096)
    repeats, warmup = (2, 1) if smoke else (10, 3)
    batch = random_batch(rows, seq_len, sizes["vocab_size"])
    batch = {name: value.to(device) for name, value in batch.items()}
    trainer = _compiled(sizes, seq_len, rows)
    steps: dict[str, Step] = {
        "compiled": lambda batch: trainer.fit([batch], 1, progress=False),
        "eager autocast": _eager(sizes, device, torch.float32),
        "eager bfloat16 weights": _eager(sizes, device, torch.bfloat16),
    }
    times = _measure(steps, batch, repeats=repeats, warmup=warmup)
    flops = trainer.parallel.model_flops
    peak = peak_flops(device)
    found: dict[str, Any] = {
        "model": {"preset": "internlm2_1_8b", **sizes, "rows": rows, "seq_len": seq_len},
        "model_flops_per_step": flops,
        "peak_flops": peak,
    }
    for name in steps:
        step_time = median(times[name])
        found[name] = {
            "step_time_s": step_time,
            "step_times_s": times[name],
            "tokens_per_second": rows * seq_len / step_time,
            "mfu": flops / step_time / peak if flops and peak else None,
            "added_peak_bytes": _added_peak_bytes(steps[name], batch),
            "busiest_ops": _busiest_ops(steps[name], batch),
        }
    return found


def peak_flops(device: torch.device) -> float | None:
    """The bf16 peak of this device, if `HARDWARE` knows it."""
    if device.type != "cuda":
        return HARDWARE["cpu"].peak_flops[torch.bfloat16]
    name = torch.cuda.get_device_name(device).lower()
    known = [hardware for key, hardware in HARDWARE.items() if key.split("-")[0] in name]
    return known[0].peak_flops[torch.bfloat16] if known else None


def _compiled(sizes: dict[str, int], seq_len: int, rows: int) -> ilm_compile.Trainer:
    model = make_model("internlm2_1_8b", sizes)
    parallel = ilm_compile.parallelize(
        model, example_inputs=model.example_inputs(rows, seq_len), dtype=torch.bfloat16
    )
    return ilm_compile.Trainer(parallel, lr=LEARNING_RATE)


def _eager(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> Step:
    with torch.device(device):
        model = make_model("internlm2_1_8b", sizes, device="meta").to_empty(device=device)
    for parameter in model.parameters():  # the values do not matter to the time
        nn.init.normal_(parameter, std=0.02)
    model = model.to(dtype)
    optimizer = adamw(model.named_parameters(), lr=LEARNING_RATE)

    def step(batch: dict[str, Tensor]) -> float:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32):
            loss: Tensor = model(**batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def _measure(
    steps: dict[str, Step], batch: dict[str, Tensor], *, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each step, A B C A B C ... ; every step ends with its loss on the CPU."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warmup + repeats):
        for name, step in steps.items():
            _synchronize()
            start = time.perf_counter()
            step(batch)
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: values[warmup:] for name, values in times.items()}


def _added_peak_bytes(step: Step, batch: dict[str, Tensor]) -> int | None:
    """The most GPU memory that one step takes beyond what stands before it."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(batch)
    return torch.cuda.max_memory_allocated() - before


def _busiest_ops(step: Step, batch: dict[str, Tensor], count: int = 12) -> list[dict[str, Any]]:
    """The ops of one step that take most of the device's time."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step(batch)
    events = profiler.key_averages()

    def seconds(event: Any) -> float:
        on_gpu = torch.cuda.is_available()
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) * 1e-6

    busiest = sorted(events, key=seconds, reverse=True)[:count]
    return [{"op": e.key[:100], "seconds": seconds(e), "calls": e.count} for e in busiest]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
