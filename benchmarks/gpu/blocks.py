"""End to end: forward and backward of a few blocks of InternLM2 on one GPU, in bf16.

With plain kernels, with fused ones, and each way with the stage under torch.compile; beside a
Hugging Face Llama of the same shape under torch.compile. All have float32 weights and compute in
bf16; none has an optimizer. MFU is the model's FLOPs over the bf16 peak of the GPU.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

import ilm_compile
from benchmarks.common import make_model, random_batch
from benchmarks.gpu.failure import Deadline, SectionError
from benchmarks.gpu.pool import run_all
from benchmarks.gpu.throughput import peak_flops
from ilm_compile.passes import FuseKernels
from ilm_compile.passes.fuse_residual import FuseResidual
from ilm_compile.runtime import Parallel

TIME_S = 68.0
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
    "InternLM2-1.8B": Shape(
        "internlm2_1_8b", {"num_layers": 2, "vocab_size": 4096, "norm_head": False}, 4, 4096
    ),
    "InternLM2-7B": Shape("internlm2_7b", {"num_layers": 2, "vocab_size": 4096}, 2, 4096),
}
SMOKE_SHAPES: dict[str, Shape] = {"tiny": Shape("internlm2_tiny", {"num_layers": 2}, 2, 16)}


def blocks(device: torch.device, smoke: bool) -> dict[str, Any]:
    """Step time, tokens/s and MFU by shape and contestant.

    A Llama that fails is left out; raises `SectionError` if one of ours does.
    """
    deadline = Deadline(TIME_S)
    shapes = SMOKE_SHAPES if smoke else SHAPES
    if device.type == "cuda":
        _compile_ahead(device)
    result: dict[str, Any] = {"left_out": {}}
    for shape_name, shape in shapes.items():
        found: dict[str, Any] = {"shape": shape}
        result[shape_name] = found
        flops = _parallel(shape, device, fused=False).model_flops
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
        raise SectionError(f"left out: {ours}: {result['left_out'][ours[0]]}", result)
    return result


def _measure(
    shape: Shape, name: str, device: torch.device, flops: float | None, *, smoke: bool
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
        "mfu": flops / seconds / peak if flops and peak else None,
    }


def _since(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _batch(shape: Shape, device: torch.device) -> Batch:
    vocab = make_model(shape.preset, shape.changes).config.vocab_size
    batch = random_batch(shape.rows, shape.seq, vocab)
    return {name: value.to(device) for name, value in batch.items()}


def _parallel(shape: Shape, device: torch.device, *, fused: bool) -> Parallel:
    """With Triton kernels, if `fused`; on the CPU their references compute the same ops."""
    model = make_model(shape.preset, shape.changes)
    keywords: dict[str, Any] = {"kernels": "triton" if fused else "torch"}
    if device.type == "cpu" and fused:
        keywords = {"kernels": "torch", "passes": [FuseKernels(), FuseResidual()]}
    example = model.example_inputs(shape.rows, shape.seq)
    return ilm_compile.parallelize(model, example_inputs=example, dtype=torch.bfloat16, **keywords)


def _ours(*, fused: bool, compiled: bool) -> Callable[[Shape, torch.device], Step]:
    def build(shape: Shape, device: torch.device) -> Step:
        parallel = _parallel(shape, device, fused=fused)
        if compiled:
            _forget_compiled(device)
            for stage in parallel.stages:
                _compile(stage.module, device)

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
    _forget_compiled(device)
    _compile(model, device)

    def step(batch: Batch) -> object:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            # its loss shifts the labels itself: the time is the same
            loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        loss.backward()
        return loss

    return step


def _compile(module: torch.nn.Module, device: torch.device) -> None:
    """In place, by Inductor; on the CPU, where the suite is only tested, not at all."""
    if device.type == "cuda":
        module.compile()


def _forget_compiled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.compiler.reset()


LLAMA = "Hugging Face Llama"
CONTESTANTS: dict[str, Callable[[Shape, torch.device], Step]] = {
    "torch kernels": _ours(fused=False, compiled=False),
    "triton kernels": _ours(fused=True, compiled=False),
    "torch kernels, torch.compile": _ours(fused=False, compiled=True),
    "triton kernels, torch.compile": _ours(fused=True, compiled=True),
    f"{LLAMA}, torch.compile": _llama,
}


def _compile_ahead(device: torch.device) -> None:
    """Fill torch.compile's and Triton's caches on disk, all contestants at a time."""
    tasks = [(shape, name, device) for shape in SHAPES for name in CONTESTANTS]
    for _ in run_all(compile_once, tasks, device, Deadline(PREPARE_S)):
        pass


def compile_once(task: tuple[str, str, torch.device]) -> None:
    """One step of a contestant. What fails here fails again where it is recorded."""
    shape, name, device = task
    try:
        CONTESTANTS[name](SHAPES[shape], device)(_batch(SHAPES[shape], device))
    except Exception:
        return
