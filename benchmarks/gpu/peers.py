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


def peer(module: str, name: str, call: Callable[..., tuple[Tensor, ...]]) -> Loader:
    """Return what imports `name` of a `module`, and returns `call` with it and the inputs."""

    def load() -> Function:
        function = getattr(import_module(module), name)
        return lambda t: call(function, t)

    return load


def _torch_add_rms_norm(t: Tensors) -> tuple[Tensor, ...]:
    total = t["x"] + t["residual"]
    return F.rms_norm(total, t["weight"].shape, t["weight"], EPS), total


def _liger_rope(function: Any, t: Tensors) -> tuple[Tensor, ...]:
    """In place, on heads before tokens; it takes each angle twice."""
    cos, sin = _tables(t, lambda table: torch.cat([table, table], -1))
    q, k = function.apply(t["q"].transpose(1, 2), t["k"].transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _turn_each(function: Any, t: Tensors) -> tuple[Tensor, ...]:
    """q and k in a launch each, with tables (S, pairs) in their dtype."""
    cos, sin = _tables(t, lambda table: table[0].to(t["q"].dtype))
    return tuple(function(t[name], cos, sin) for name in ("q", "k"))


def _add_and_keep(function: Any, t: Tensors, *rest: Any) -> tuple[Tensor, ...]:
    options = {"residual": t["residual"], "eps": EPS, "prenorm": True}
    return tuple(function(t["x"], t["weight"], *rest, **options))


def _tables(t: Tensors, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin as a peer takes them: made by the first call, kept among the inputs."""
    for name in ("cos", "sin"):
        if f"changed {name}" not in t:
            t[f"changed {name}"] = change(t[name])
    return t["changed cos"], t["changed sin"]


_FLASH_NORM = ("flash_attn.ops.triton.layer_norm", "rms_norm_fn")
_QUACK_NORM = ("quack.rmsnorm", "rmsnorm")
_LIGER = "liger_kernel.ops"
PEERS: dict[str, dict[str, Loader]] = {
    "rms_norm": {
        EAGER: lambda: lambda t: (F.rms_norm(t["x"], t["weight"].shape, t["weight"], EPS),),
        "Liger": peer(
            *(f"{_LIGER}.rms_norm", "LigerRMSNormFunction"),
            lambda f, t: (f.apply(t["x"], t["weight"], EPS, 0.0, "gemma"),),
        ),
        "flash-attn": peer(*_FLASH_NORM, lambda f, t: (f(t["x"], t["weight"], None, eps=EPS),)),
        "QuACK": peer(*_QUACK_NORM, lambda f, t: (f(t["x"], t["weight"], eps=EPS),)),
    },
    "add_rms_norm": {
        EAGER: lambda: _torch_add_rms_norm,
        "Liger": peer(
            *(f"{_LIGER}.fused_add_rms_norm", "LigerFusedAddRMSNormFunction"),
            lambda f, t: tuple(f.apply(t["x"], t["residual"], t["weight"], EPS, 0.0, "gemma")),
        ),
        "flash-attn": peer(*_FLASH_NORM, lambda f, t: _add_and_keep(f, t, None)),
        "QuACK": peer(*_QUACK_NORM, _add_and_keep),
    },
    "swiglu": {
        EAGER: lambda: TIMED["swiglu"].plain,
        "Liger": peer(
            *(f"{_LIGER}.swiglu", "LigerSiLUMulFunction"),
            lambda f, t: (f.apply(t["gate"], t["up"]),),
        ),
    },
    "rotary": {
        EAGER: lambda: TIMED["rotary"].plain,
        "Liger": peer(f"{_LIGER}.rope", "LigerRopeFunction", _liger_rope),
        "flash-attn": peer("flash_attn.layers.rotary", "apply_rotary_emb", _turn_each),
        "QuACK": peer("quack.rotary", "apply_rotary_emb", _turn_each),
    },
    "qkv_rotary": {EAGER: lambda: TIMED["qkv_rotary"].plain},
}
