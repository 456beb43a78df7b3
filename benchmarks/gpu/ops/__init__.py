"""The fused ops, by name: what is checked, and what is timed."""

from __future__ import annotations

import torch

from benchmarks.gpu.ops.attentions import attention
from benchmarks.gpu.ops.losses import vocab_cross_entropy_backward, vocab_statistics
from benchmarks.gpu.ops.norms import add_layer_norm, add_rms_norm, glu, rms_norm
from benchmarks.gpu.ops.op import KernelOp
from benchmarks.gpu.ops.rotations import qkv_rotary, rotary

SOME = (100, 4096)  # widths at which an option is checked

# As InternLM2 calls them: compared with others, and held to goals.
TIMED: dict[str, KernelOp] = {
    "rms_norm": rms_norm(),
    "add_rms_norm": add_rms_norm(),
    "swiglu": glu(),
    "rotary": rotary(),
    "qkv_rotary": qkv_rotary(),
}

# One of each kernel, for checks that hold whatever the options.
FAMILIES: dict[str, KernelOp] = TIMED | {
    "vocab_statistics": vocab_statistics(),
    "vocab_cross_entropy_backward": vocab_cross_entropy_backward(),
    "attention": attention(),
}

CHECKED: dict[str, KernelOp] = FAMILIES | {
    "rms_norm, float32 weight": rms_norm(weight_dtype=torch.float32, widths=SOME),
    "rms_norm, cast before scale": rms_norm(cast=True, widths=SOME),
    "rms_norm, weight offset 1": rms_norm(offset=1.0, widths=SOME),
    "rms_norm, no weight": rms_norm(has_weight=False, widths=SOME),
    "add_rms_norm, float32 residual": add_rms_norm(residual_dtype=torch.float32, widths=SOME),
    "add_layer_norm": add_layer_norm(),
    "add_layer_norm, no bias": add_layer_norm(has_bias=False, widths=SOME),
    "geglu": glu("gelu", widths=SOME),
    "geglu, tanh": glu("gelu_tanh", widths=SOME),
    "rotary, interleaved": rotary(interleaved=True, widths=SOME),
    "rotary, positions, part of a head": rotary(positions=True, share=0.5, widths=SOME),
    "qkv_rotary, interleaved, positions": qkv_rotary(interleaved=True, positions=True, widths=SOME),
    "attention, packed": attention(packed=True),
}
