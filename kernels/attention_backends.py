"""What computes `ilm::attention` on CUDA: flash-attn, torch's varlen attention or torch's SDPA.

Each is a differentiable function of public API, and autograd goes through it: so its own forward
op keeps the logsumexp that its own backward op needs. The first in BACKENDS that can compute the
input is taken, of rows that are one document each SDPA; which, and why not those before it, is said
once in the log of this module.

Shapes in this file: q (B, S, H, D), k and v (B, S, G, D), cu_seqlens as documents.py has it. A
backend takes the queries from token `first` on only: q (B, S - first, H, D).
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.documents import document_starts, flat_boundaries, fold, runs_of
from ilm_compile.kernels.last_queries import attend_last

logger = logging.getLogger(__name__)
Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None, int], Tensor]

FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_DIM = 256
FLASH_CAPABILITY = (8, 0)


def load_flash_attn() -> Backend:
    """flash-attn's kernel over flattened tokens. Raises ImportError: not there, or built wrong."""
    from flash_attn import flash_attn_varlen_func

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        scale: float | None,
        first: int = 0,
    ) -> Tensor:
        tokens = (x.flatten(0, 1) for x in (q, k, v))
        options = {"softmax_scale": scale, "causal": True}
        out = flash_attn_varlen_func(*tokens, *_lengths(q, k, cu_seqlens, first), **options)
        return _like(out, q)

    return run


def load_varlen() -> Backend:
    """torch.nn.attention.varlen. Raises ImportError where this torch has it not, or not enough."""
    from torch.nn.attention import varlen

    varlen_attn: Callable[..., Any] = varlen.varlen_attn
    known = inspect.signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= set(known):
        raise ImportError("this torch's varlen_attn takes no window_size and scale")

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        scale: float | None,
        first: int = 0,
    ) -> Tensor:
        lengths = _lengths(q, k, cu_seqlens, first)
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # all before, none after
        if "enable_gqa" in known:
            options["enable_gqa"] = q.shape[2] != k.shape[2]
        else:
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        tokens = (x.flatten(0, 1) for x in (q, k, v))
        return _like(varlen_attn(*tokens, *lengths, **options), q)

    return run


def load_sdpa() -> Backend:
    """scaled_dot_product_attention, with a (S, S) mask for each row where documents are packed."""
    return _sdpa


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    first: int = 0,
) -> Tensor:
    query, key, value = (fold(x, cu_seqlens).transpose(1, 2) for x in (q, k, v))
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[2] != k.shape[2]}
    if cu_seqlens is None:
        return _like(attend_last(query, key, value, **options).transpose(1, 2), q)
    num_queries, num_keys = query.shape[2], key.shape[2]
    starts = document_starts(cu_seqlens.reshape(-1, cu_seqlens.shape[-1]), num_keys)
    mask = starts[:, None, first:, None] == starts[:, None, None, :]
    mask.logical_and_(mask.new_ones(num_queries, num_keys).tril_(first))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    return _like(out.transpose(1, 2), q)


def _lengths(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, first: int
) -> tuple[Tensor, Tensor, int, int]:
    """Boundaries of the documents among the queries and among the keys, and bounds of their length.

    No document is longer. To know the longest would be to wait for the device.
    """
    batch, num_tokens = k.shape[:2]
    keys = flat_boundaries(cu_seqlens, batch, num_tokens, q.device)
    if q.shape[1] == num_tokens:
        flattened = cu_seqlens is not None and cu_seqlens.dim() == 1
        longest = batch * num_tokens if flattened else num_tokens
        return keys, keys, longest, longest
    queries = flat_boundaries(cu_seqlens, batch, num_tokens, q.device, first)
    return queries, keys, q.shape[1], num_tokens


def _like(out: Tensor, q: Tensor) -> Tensor:
    return out.reshape(q.shape).contiguous()


# By name, those first that are preferred where rows have documents in them.
BACKENDS: dict[str, Callable[[], Backend]] = {
    "flash_attn": load_flash_attn,
    "varlen": load_varlen,
    "sdpa": load_sdpa,
}
_forced: str | None = None


def set_attention_backend(name: str | None) -> None:
    """Compute `ilm::attention` on CUDA by the named backend from now on; None: by the best one.

    name: "flash_attn" (the flash-attn package), "varlen" (torch.nn.attention.varlen) or "sdpa".
    Raises IlmCompileError if there is no such backend or it cannot be imported; a call that it
    cannot compute raises then. What a compiled graph has traced stays. The CPU has one way only.
    """
    global _forced
    if name is not None and name not in BACKENDS:
        raise IlmCompileError(
            f"set_attention_backend: expected one of {', '.join(BACKENDS)}, or None; got {name!r}"
        )
    if name is not None:
        try:
            BACKENDS[name]()
        except ImportError as error:
            raise IlmCompileError(
                f"set_attention_backend: {name} cannot be imported: {error}; "
                "install it, or take another backend"
            ) from error
    _forced = name
    choose.cache_clear()


def obstacle(
    name: str, dtype: torch.dtype, head_dim: int, capability: tuple[int, int] | None
) -> str | None:
    """Why the backend cannot compute such an input, or None.

    capability: of the device, (major, minor); None where there is none to ask.
    """
    if name == "sdpa":
        return None
    try:
        BACKENDS[name]()
    except ImportError as error:
        return str(error)
    if dtype not in FLASH_DTYPES:
        return f"it takes float16 and bfloat16, not {dtype}"
    if head_dim > FLASH_HEAD_DIM or head_dim % 8:
        return f"it takes head sizes up to {FLASH_HEAD_DIM} that 8 divides, not {head_dim}"
    if capability is None or capability < FLASH_CAPABILITY:
        got = "none: no device is visible" if capability is None else "{}.{}".format(*capability)
        return f"it needs compute capability 8.0, here is {got}"
    return None


@cache
def choose(
    dtype: torch.dtype, head_dim: int, device: torch.device, *, is_packed: bool = True
) -> Backend:
    """The backend for such inputs. Logged at INFO, once. Raises IlmCompileError if a forced one
    cannot compute them.

    is_packed: rows have documents in them. Where each is one, torch's SDPA is the best: it needs no
    boundaries and no mask, repeats no keys, and takes cuDNN's kernel on Hopper.
    """
    visible = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(device) if visible else None
    passed_over: list[str] = []
    preferred = BACKENDS if is_packed else {"sdpa": BACKENDS["sdpa"], **BACKENDS}
    for name, load in preferred.items():
        if _forced not in (None, name):
            continue
        reason = obstacle(name, dtype, head_dim, capability)
        if reason is None:
            why = "".join(f"; {other}" for other in passed_over)
            how = "set_attention_backend" if _forced else "the best there is"
            logger.info(
                "ilm::attention of %s, head size %d, on %s: %s (%s)%s",
                *(dtype, head_dim, device, name, how, why),
            )
            return load()
        passed_over.append(f"not {name}: {reason}")
    raise IlmCompileError(
        f"ilm::attention: set_attention_backend({_forced!r}) does not fit this input: "
        f"{passed_over[0]}; choose None to have the best one taken"
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    tokens: Sequence[int] | None = None,
) -> Tensor:
    """`ilm::attention` by the chosen backend, differentiable; of the shape of q, contiguous."""
    if q.numel() == 0:
        return q.clone(memory_format=torch.contiguous_format)
    is_packed = cu_seqlens is not None or tokens is not None
    backend = choose(q.dtype, q.shape[3], q.device, is_packed=is_packed)
    if tokens is None:
        return backend(q, k, v, cu_seqlens, scale, 0)
    runs, (batch, num_tokens) = runs_of(tokens, k.shape[1]), k.shape[:2]
    query, key, value = (fold(x, cu_seqlens) for x in (q, k, v))
    if cu_seqlens is not None and cu_seqlens.dim() == 1:  # rows are one behind the other
        offsets = range(0, batch * num_tokens, num_tokens)
        runs = [(row + start, row + stop) for row in offsets for start, stop in runs]
        cu_seqlens = cu_seqlens[None]
    found, here = [], 0
    for start, stop in runs:
        asked, here = query[:, here : here + stop - start], here + stop - start
        found.append(backend(asked, key[:, :stop], value[:, :stop], cu_seqlens, scale, start))
    return _like(torch.cat(found, 1), q)
