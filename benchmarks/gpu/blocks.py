"""End to end: forward and backward of a few blocks of InternLM2 on one GPU, in bf16.

With plain kernels, with fused ones, and each way with ``compile=True``; beside the
model itself in eager mode, and a Hugging Face Llama of the same shape under torch.compile. All
compute in bf16 on float32 weights, one eager model on bf16 ones; none has an optimizer. MFU is the
model's FLOPs (`ilm_compile.cost.model_flops`: nothing computed twice, causal attention at half)
over the bf16 peak of the GPU. Weights are random numbers that the GPU draws: initial values would
take seconds for each contestant.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import ilm_compile
from benchmarks.common import make_model, random_batch
from benchmarks.gpu.failure import Deadline, Result, SectionError
from benchmarks.gpu.pool import compile_ahead, forget_compiled
from ilm_compile.cost import HARDWARE, model_flops
from ilm_compile.passes import FuseKernels
from ilm_compile.passes.fuse_residual import FuseResidual
from ilm_compile.runtime import Parallel

TIME_S = 138.0
PREPARE_S = 40.0
REPEATS, WARMUP = 15, 3

Batch = dict[str, Tensor]
Step = Callable[[Batch], object]


@dataclass(frozen=True, slots=True)
class Shape:
    """A preset of `ilm_compile.models` with changes. rows, seq: of a step."""

    preset: str
    changes: dict[str, Any]
    rows: int
    seq: int


# Two blocks and a small vocabulary: seconds to compile, and blocks take nearly all of the time.
SHAPES: dict[str, Shape] = {
    "InternLM2-7B": Shape("internlm2_7b", {"num_layers": 2, "vocab_size": 4096}, 2, 4096),
    "InternLM2-1.8B": Shape(
        "internlm2_1_8b", {"num_layers": 2, "vocab_size": 4096, "norm_head": False}, 4, 4096
    ),
}
SMOKE_SHAPES: dict[str, Shape] = {"tiny": Shape("internlm2_tiny", {"num_layers": 2}, 2, 16)}


def blocks(device: torch.device, smoke: bool, result: Result) -> None:
    """Step time, tokens/s, MFU, memory and busiest ops by shape and contestant.

    A Llama that fails is left out; raises `SectionError` if one of ours does.
    """
    deadline = Deadline(TIME_S)
    shapes = SMOKE_SHAPES if smoke else SHAPES
    tasks = [(shape, name, device) for shape in SHAPES for name in CONTESTANTS]
    compile_ahead(compile_once, tasks, device, PREPARE_S)
    result["left_out"] = {}
    for shape_name, shape in shapes.items():
        found: dict[str, Any] = {"shape": shape}
        result[shape_name] = found
        flops = block_flops(shape)
        for name in CONTESTANTS:
            if deadline.passed:
                result["left_out"][f"{shape_name}, {name}"] = "no time"
                continue
            try:
                found[name] = _measure(shape, name, device, flops, smoke=smoke)
            except Exception:
                result["left_out"][f"{shape_name}, {name}"] = traceback.format_exc()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    ours = [key for key in result["left_out"] if LLAMA not in key]
    if ours:
        raise SectionError(f"left out: {ours}: {result['left_out'][ours[0]]}")


def _measure(
    shape: Shape, name: str, device: torch.device, flops: float, *, smoke: bool
) -> dict[str, Any]:
    batch = _batch(shape, device)
    step = CONTESTANTS[name](shape, device)
    start = time.perf_counter()
    step(batch)
    first = _since(start, device)
    times = []
    for _ in range(2 if smoke else WARMUP + REPEATS):
        start = time.perf_counter()
        step(batch)
        times.append(_since(start, device))
    times = times[0 if smoke else WARMUP :]
    low, _, high = quantiles(times, n=4, method="inclusive")
    seconds, peak = median(times), peak_flops(device)
    return {
        "first_step_s": first,
        "step_time_s": seconds,
        "quartiles_s": (low, high),
        "tokens_per_second": shape.rows * shape.seq / seconds,
        "mfu": flops / seconds / peak if peak else None,
        "added_peak_bytes": _added_peak_bytes(step, batch),
        "busiest_ops": _busiest_ops(step, batch),
    }


def block_flops(shape: Shape) -> float:
    """FLOPs of a step of the model, forward and backward, counted without weights or a device."""
    model = make_model(shape.preset, shape.changes)
    example = model.example_inputs(shape.rows, shape.seq)
    return model_flops(ilm_compile.partition(model, example_inputs=example, kernels="torch").graph)


def peak_flops(device: torch.device) -> float | None:
    """The bf16 peak of this device, if `HARDWARE` knows it."""
    if device.type != "cuda":
        return HARDWARE["cpu"].peak_flops[torch.bfloat16]
    name = torch.cuda.get_device_name(device).lower()
    known = [hardware for key, hardware in HARDWARE.items() if key.split("-")[0] in name]
    return known[0].peak_flops[torch.bfloat16] if known else None


def _added_peak_bytes(step: Step, batch: Batch) -> int | None:
    """The most GPU memory that one step takes beyond what stands before it."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(batch)
    return torch.cuda.max_memory_allocated() - before


def _busiest_ops(step: Step, batch: Batch, count: int = 12) -> list[dict[str, Any]]:
    """The ops of one step that take most of the device's time."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step(batch)

    def seconds(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) * 1e-6

    busiest = sorted(profiler.key_averages(), key=seconds, reverse=True)[:count]
    return [{"op": e.key[:100], "seconds": seconds(e), "calls": e.count} for e in busiest]


def _since(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _batch(shape: Shape, device: torch.device) -> Batch:
    vocab = make_model(shape.preset, shape.changes).config.vocab_size
    batch = random_batch(shape.rows, shape.seq, vocab)
    return {name: value.to(device) for name, value in batch.items()}


def _parallel(shape: Shape, device: torch.device, *, fused: bool, compiled: bool) -> Parallel:
    """With Triton kernels, if `fused`; on the CPU their references compute the same ops."""
    model = make_model(shape.preset, shape.changes)
    keywords: dict[str, Any] = {"kernels": "triton" if fused else "torch"}
    if device.type == "cpu" and fused:
        keywords = {"kernels": "torch", "passes": [FuseKernels(), FuseResidual()]}
    keywords["compile"] = compiled and device.type == "cuda"
    keywords["example_inputs"] = model.example_inputs(shape.rows, shape.seq)
    sizes = dict(model.named_parameters())

    def nothing(
        name: str, *, rows: tuple[int, int] | None = None, seed: int | None = None
    ) -> Tensor:
        return torch.empty(sizes[name].shape, device=device)

    with mock.patch.object(model, "initial_parameter", nothing):
        parallel = ilm_compile.parallelize(model, dtype=torch.bfloat16, **keywords)
    with torch.no_grad():
        for _, parameter in parallel.named_parameters():
            nn.init.normal_(parameter, std=0.02)
    return parallel


def _ours(*, fused: bool, compiled: bool) -> Callable[[Shape, torch.device], Step]:
    def build(shape: Shape, device: torch.device) -> Step:
        if compiled:
            forget_compiled(device)
        parallel = _parallel(shape, device, fused=fused, compiled=compiled)

        def step(batch: Batch) -> object:
            parallel.zero_grad()
            return parallel.execute_schedule(batch)

        return step

    return build


def _llama(shape: Shape, device: torch.device) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = make_model(shape.preset, shape.changes).config
    sizes: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_attention_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": shape.seq,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    forget_compiled(device)
    _compile(model, device)
    # its loss shifts the labels itself: the time is the same
    return _plain_step(model, device, lambda batch: model(**batch).loss)


def _eager(dtype: torch.dtype) -> Callable[[Shape, torch.device], Step]:
    def build(shape: Shape, device: torch.device) -> Step:
        model = make_model(shape.preset, shape.changes).to_empty(device=device)
        for parameter in model.parameters():  # the values do not matter to the time
            nn.init.normal_(parameter, std=0.02)
        model = model.to(dtype)
        return _plain_step(model, device, lambda batch: model(**batch))

    return build


def _plain_step(model: nn.Module, device: torch.device, loss_of: Callable[[Batch], Tensor]) -> Step:
    is_cast = next(model.parameters()).dtype == torch.float32

    def step(batch: Batch) -> object:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=is_cast):
            loss = loss_of(batch)
        torch.autograd.backward(loss)
        return loss

    return step


def _compile(module: torch.nn.Module, device: torch.device) -> None:
    """In place, by Inductor; on the CPU, where the suite is only tested, not at all."""
    if device.type == "cuda":
        module.compile()


LLAMA = "Hugging Face Llama"
CONTESTANTS: dict[str, Callable[[Shape, torch.device], Step]] = {
    "torch kernels": _ours(fused=False, compiled=False),
    "triton kernels": _ours(fused=True, compiled=False),
    "torch kernels, compile": _ours(fused=False, compiled=True),
    "triton kernels, compile": _ours(fused=True, compiled=True),
    "eager autocast": _eager(torch.float32),
    "eager bfloat16 weights": _eager(torch.bfloat16),
    f"{LLAMA}, torch.compile": _llama,
}


def compile_once(task: tuple[str, str, torch.device]) -> None:
    """One step of a contestant."""
    shape, name, device = task
    CONTESTANTS[name](SHAPES[shape], device)(_batch(SHAPES[shape], device))
