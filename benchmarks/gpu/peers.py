"""Who else computes a fused op: torch in two ways, Liger, flash-attn's Triton kernels, QuACK.

Eager torch is the best it has: F.rms_norm for the norms, else several calls.

A library that is not installed, or does not import here, is left out, and the JSON says why.
Calls are differentiable and take the inputs of `benchmarks.gpu.ops` by name, in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.ops import TIMED
from benchmarks.gpu.ops.op import EPS, Function, Tensors

OURS = "ilm"
COMPILED = "torch.compile"
EAGER = "eager torch"

# op -> name -> what imports the peer and returns the call.
Loader = Callable[[], Function]


def load_peers(op: str, device: torch.device) -> tuple[dict[str, Function], dict[str, str]]:
    """The peers of an op by name, and for those left out the reason."""
    found: dict[str, Function] = {COMPILED: compiled(TIMED[op].plain, device)}
    left_out: dict[str, str] = {}
    for name, load in PEERS[op].items():
        try:
            found[name] = load()
        except Exception as error:  # an extension for another torch fails in many ways
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, left_out


def compiled(function: Any, device: torch.device) -> Any:
    """torch.compile's; on the CPU, where the suite is only tested, the function as it is."""
    return torch.compile(function) if device.type == "cuda" else function


def _get(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def _torch_rms_norm() -> Function:
    return lambda t: (F.rms_norm(t["x"], t["weight"].shape, t["weight"], EPS),)


def _torch_add_rms_norm() -> Function:
    def call(t: Tensors) -> tuple[Tensor, ...]:
        total = t["x"] + t["residual"]
        return F.rms_norm(total, t["weight"].shape, t["weight"], EPS), total

    return call


def _liger_rms_norm() -> Function:
    function = _get("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    return lambda t: (function.apply(t["x"], t["weight"], EPS, 0.0, "gemma"),)


def _liger_add_rms_norm() -> Function:
    function = _get("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    return lambda t: tuple(function.apply(t["x"], t["residual"], t["weight"], EPS, 0.0, "gemma"))


def _liger_swiglu() -> Function:
    function = _get("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    return lambda t: (function.apply(t["gate"], t["up"]),)


def _liger_rope() -> Function:
    """In place, on heads before tokens; it takes each angle twice."""
    function = _get("liger_kernel.ops.rope", "LigerRopeFunction")

    def call(t: Tensors) -> tuple[Tensor, ...]:
        cos, sin = _tables(t, lambda table: torch.cat([table, table], -1))
        q, k = function.apply(t["q"].transpose(1, 2), t["k"].transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


def _flash_rms_norm() -> Function:
    function = _get("flash_attn.ops.triton.layer_norm", "rms_norm_fn")
    return lambda t: (function(t["x"], t["weight"], None, eps=EPS),)


def _flash_add_rms_norm() -> Function:
    function = _get("flash_attn.ops.triton.layer_norm", "rms_norm_fn")
    return lambda t: tuple(
        function(t["x"], t["weight"], None, residual=t["residual"], eps=EPS, prenorm=True)
    )


def _flash_rotary() -> Function:
    function = _get("flash_attn.layers.rotary", "apply_rotary_emb")
    return _turn_each(function)


def _quack_rms_norm() -> Function:
    function = _get("quack.rmsnorm", "rmsnorm")
    return lambda t: (function(t["x"], t["weight"], eps=EPS),)


def _quack_add_rms_norm() -> Function:
    function = _get("quack.rmsnorm", "rmsnorm")
    return lambda t: tuple(
        function(t["x"], t["weight"], residual=t["residual"], eps=EPS, prenorm=True)
    )


def _quack_rotary() -> Function:
    function = _get("quack.rotary", "apply_rotary_emb")
    return _turn_each(function)


def _turn_each(function: Any) -> Function:
    """q and k in a launch each, with tables (S, pairs) in their dtype."""

    def call(t: Tensors) -> tuple[Tensor, ...]:
        cos, sin = _tables(t, lambda table: table[0].to(t["q"].dtype))
        return tuple(function(t[name], cos, sin) for name in ("q", "k"))

    return call


def _tables(t: Tensors, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin as a peer takes them: made by the first call, kept among the inputs."""
    for name in ("cos", "sin"):
        if f"changed {name}" not in t:
            t[f"changed {name}"] = change(t[name])
    return t["changed cos"], t["changed sin"]


PEERS: dict[str, dict[str, Loader]] = {
    "rms_norm": {
        EAGER: _torch_rms_norm,
        "Liger": _liger_rms_norm,
        "flash-attn": _flash_rms_norm,
        "QuACK": _quack_rms_norm,
    },
    "add_rms_norm": {
        EAGER: _torch_add_rms_norm,
        "Liger": _liger_add_rms_norm,
        "flash-attn": _flash_add_rms_norm,
        "QuACK": _quack_add_rms_norm,
    },
    "swiglu": {EAGER: lambda: TIMED["swiglu"].plain, "Liger": _liger_swiglu},
    "rotary": {
        EAGER: lambda: TIMED["rotary"].plain,
        "Liger": _liger_rope,
        "flash-attn": _flash_rotary,
        "QuACK": _quack_rotary,
    },
    "qkv_rotary": {EAGER: lambda: TIMED["qkv_rotary"].plain},
}
