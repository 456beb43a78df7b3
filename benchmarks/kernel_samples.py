"""One call of every Triton kernel's launcher, by width: what is compiled ahead of time.

A kernel that is added gets a line here, and with it the tests of `tests/kernels/test_ahead_of_time`
and the table of `python -m benchmarks.kernel_aot`. The tensors lie on the CPU and are small: how a
kernel is compiled does not depend on the number of rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ilm_compile.kernels import MAX_CENTERED
from ilm_compile.kernels.launch import Launch, launch_for

NUM_ROWS = 5
EPS = 1e-5
BF16, FP32 = torch.bfloat16, torch.float32
# InternLM2-1.8B and 7B, InternLM-20B, InternLM2-20B, Llama-3-70B; Mistral Large, Llama-3-405B.
HIDDEN_SIZES = (2048, 4096, 5120, 6144, 8192, 12288, 16384)
# Llama-3-8B on two ranks and one, Llama-2-7B on one.
INTERMEDIATE_SIZES = (7168, 11008, 14336)
HEAD_SIZES = (64, 96, 128)
QUERY_HEADS, KEY_HEADS = 32, 8
# InternLM2's vocabulary on eight ranks and one.
CLASSES = (11568, 92544)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A launcher with its arguments, and the widths that matter.

    launcher: `module:function` in ilm_compile.kernels. arguments: takes a width, whatever that is
    for the kernel. meaning: of the width, for the table. launches: the `module:TABLE`
    of `Launch` that it is launched by. pipelined: whether a loop prefetches with cp.async.
    narrow_loads, narrow_stores: instructions for the few numbers of a token (its angles, position,
    target, results), which no vector can hold.
    """

    launcher: str
    arguments: Callable[[int], tuple[Any, ...]]
    widths: Sequence[int]
    meaning: str
    launches: str | None = None
    pipelined: bool = False
    narrow_loads: int = 0
    narrow_stores: int = 0

    def call(self, width: int) -> Any:
        """Launch it. What comes back is undefined unless the kernel really runs."""
        return _find(self.launcher)(*self.arguments(width))

    def launch(self, width: int) -> Launch | None:
        """How it is launched at this width, where a table says so."""
        if self.launches is None:
            return None
        table = _find(self.launches)
        return launch_for(table, min(width, table[-1].width))

    def prefetches(self, width: int) -> bool:
        """Whether a loop is to prefetch with cp.async."""
        launch = self.launch(width)
        return self.pipelined and (launch is None or launch.stages > 1)


def _find(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(f"ilm_compile.kernels.{module}"), name)


def rows(width: int, dtype: torch.dtype = BF16) -> Tensor:
    """(NUM_ROWS, width) of zeros."""
    return torch.zeros(NUM_ROWS, width, dtype=dtype)


def norm(launcher: str, *dtypes: torch.dtype, pipelined: bool = False) -> Sample:
    """A norm of as many tensors of rows, with the weight that training in bf16 has: in float32."""

    def arguments(hidden: int) -> tuple[Any, ...]:
        tensors = [rows(hidden, dtype) for dtype in dtypes]
        return (*tensors, torch.ones(hidden), EPS, False, 0.0)

    return Sample(
        launcher=f"triton_rms_norm:{launcher}",
        arguments=arguments,
        widths=HIDDEN_SIZES,
        meaning="hidden",
        launches=f"triton_norm:{'BACKWARD' if pipelined else 'FORWARD'}",
        pipelined=pipelined,
    )


def layer_norm(launcher: str, num_tensors: int, *, pipelined: bool = False) -> Sample:
    """As `norm`, with a bias; the backward of both ops is one, given a gradient of the sum."""

    def arguments(hidden: int) -> tuple[Any, ...]:
        tensors = [rows(hidden) for _ in range(num_tensors)]
        bias = True if pipelined else torch.zeros(hidden)
        return (*tensors, torch.ones(hidden), bias, EPS)

    return Sample(
        launcher=f"triton_layer_norm:{launcher}",
        arguments=arguments,
        launches=f"triton_norm:{'BACKWARD' if pipelined else 'CENTERED_FORWARD'}",
        widths=[width for width in HIDDEN_SIZES if width <= MAX_CENTERED],
        meaning="hidden",
        pipelined=pipelined,
    )


def glu(
    launcher: str,
    num_tensors: int,
    launches: str,
    activation: str = "silu",
    *,
    halves: bool = False,
) -> Sample:
    """GLU of as many tensors of rows; `halves`: gate and up are those of one projection."""

    def arguments(width: int) -> tuple[Any, ...]:
        if halves:
            grads = [rows(width) for _ in range(num_tensors - 2)]
            return (*grads, *rows(2 * width).chunk(2, dim=-1), activation)
        return (*(rows(width) for _ in range(num_tensors)), activation)

    return Sample(
        launcher=f"triton_glu:{launcher}",
        arguments=arguments,
        widths=INTERMEDIATE_SIZES,
        meaning="intermediate",
        launches=f"triton_glu:{launches}",
    )


def angles(width: int, positions: bool) -> tuple[Any, ...]:
    """Cosines, sines and position ids for heads of `width`."""
    table = torch.zeros(NUM_ROWS, width // 2)
    if positions:
        return table, table, torch.zeros(1, NUM_ROWS, dtype=torch.int64)
    return table.unsqueeze(0), table.unsqueeze(0), None


def heads(num_heads: int, width: int) -> Tensor:
    """(1, NUM_ROWS, num_heads, width) of zeros."""
    return torch.zeros(1, NUM_ROWS, num_heads, width, dtype=BF16)


def rotary(
    launcher: str, *num_heads: int, positions: bool = False, interleaved: bool = False
) -> Sample:
    """Rotary positions of tensors of so many heads; every thread loads a cosine and a sine."""

    def arguments(width: int) -> tuple[Any, ...]:
        tensors = [heads(n, width) for n in num_heads]
        if launcher == "triton_qkv_rotary:qkv_rotary":
            tensors = [x.unflatten(2, (KEY_HEADS, -1)) for x in tensors]
        return (*tensors, *angles(width, positions), interleaved)

    return Sample(
        launcher=launcher,
        arguments=arguments,
        widths=HEAD_SIZES,
        meaning="head size",
        narrow_loads=2 + positions,
    )


def vocab_statistics(width: int) -> tuple[Any, ...]:
    """Arguments of the launcher: logits, targets, and where this rank's classes begin."""
    return rows(width), torch.zeros(NUM_ROWS, dtype=torch.int64), width, -100, 2 * width


def vocab_backward(width: int) -> tuple[Any, ...]:
    """Arguments of the launcher, with a logsumexp and a gradient for each token."""
    per_token = torch.zeros(NUM_ROWS)
    target = torch.zeros(NUM_ROWS, dtype=torch.int64)
    return rows(width), target, per_token, per_token, width, -100, 0.1, 2 * width


def column_sums(width: int) -> tuple[Any, ...]:
    """Arguments of the launcher: what the programs of a norm's backward have written."""
    return rows(width, FP32), BF16


# All in bf16; `mixed`: with the residual stream in float32.
SAMPLES: dict[str, Sample] = {
    "rms_norm": norm("rms_norm", BF16),
    "rms_norm_backward": norm("rms_norm_backward", BF16, BF16, pipelined=True),
    "add_rms_norm": norm("add_rms_norm", BF16, BF16),
    "add_rms_norm mixed": norm("add_rms_norm", BF16, FP32),
    "add_rms_norm_backward": norm("add_rms_norm_backward", BF16, BF16, BF16, pipelined=True),
    "add_rms_norm_backward mixed": norm("add_rms_norm_backward", BF16, FP32, FP32, pipelined=True),
    "layer_norm": layer_norm("layer_norm", 1),
    "add_layer_norm": layer_norm("add_layer_norm", 2),
    "layer_norm_backward": layer_norm("layer_norm_backward", 3, pipelined=True),
    "column_sums": Sample(
        launcher="triton_column_sums:column_sums",
        arguments=column_sums,
        widths=HIDDEN_SIZES,
        meaning="hidden",
        narrow_stores=1,
    ),
    "swiglu": glu("glu", 2, "FORWARD"),
    "swiglu_backward": glu("glu_backward", 3, "BACKWARD"),
    "swiglu halves": glu("glu", 2, "FORWARD", halves=True),
    "swiglu_backward halves": glu("glu_backward", 3, "BACKWARD", halves=True),
    "geglu": glu("glu", 2, "FORWARD", "gelu"),
    "geglu_backward": glu("glu_backward", 3, "BACKWARD", "gelu"),
    "geglu tanh": glu("glu", 2, "FORWARD", "gelu_tanh"),
    "geglu_backward tanh": glu("glu_backward", 3, "BACKWARD", "gelu_tanh"),
    "rotary": rotary("triton_rotary:rotary", QUERY_HEADS, KEY_HEADS),
    "rotary interleaved": rotary(
        "triton_rotary:rotary", QUERY_HEADS, KEY_HEADS, positions=True, interleaved=True
    ),
    "rotary_backward": rotary("triton_rotary:rotary_backward", QUERY_HEADS, KEY_HEADS),
    "qkv_rotary": rotary("triton_qkv_rotary:qkv_rotary", QUERY_HEADS + 2 * KEY_HEADS),
    "qkv_rotary interleaved": rotary(
        *("triton_qkv_rotary:qkv_rotary", QUERY_HEADS + 2 * KEY_HEADS),
        positions=True,
        interleaved=True,
    ),
    "qkv_rotary_backward": rotary(
        "triton_qkv_rotary:qkv_rotary_backward", QUERY_HEADS, KEY_HEADS, KEY_HEADS
    ),
    "vocab_statistics": Sample(
        launcher="triton_vocab_loss:vocab_statistics",
        arguments=vocab_statistics,
        widths=CLASSES,
        meaning="classes",
        narrow_loads=2,
        narrow_stores=4,
    ),
    "vocab_cross_entropy_backward": Sample(
        launcher="triton_vocab_loss:vocab_cross_entropy_backward",
        arguments=vocab_backward,
        widths=CLASSES,
        meaning="classes",
        narrow_loads=3,
    ),
}
