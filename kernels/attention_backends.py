"""What computes `ilm::attention` on CUDA: flash-attn, torch's varlen attention or torch's SDPA.

Each is a differentiable function of public API, and autograd goes through it: so its own forward
op keeps the logsumexp that its own backward op needs. The first in BACKENDS that can compute the
input is taken, of rows that are one document each SDPA; which, and why not those before it, is said
once in the log of this module.

Shapes in this file: q (rows, N, H, D), the last N of the tokens of k and v (rows, M, G, D), rows as
`fold` lays them; boundaries of one run of queries, (sides, rows, n + 1), as documents.py has them.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.attention_order import flash_version
from ilm_compile.kernels.documents import boundaries, fold, is_flat, runs_of
from ilm_compile.kernels.last_queries import attend_documents, attend_last

logger = logging.getLogger(__name__)
Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]

FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_DIM = 256
FLASH_CAPABILITY = (8, 0)


def load_flash_attn() -> Backend:
    """flash-attn's kernel over flattened tokens. Raises ImportError: not there, or built wrong."""
    from flash_attn import flash_attn_varlen_func

    def run(
        q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, scale: float | None
    ) -> Tensor:
        tokens = (x.flatten(0, 1) for x in (q, k, v))
        options = {"softmax_scale": scale, "causal": True}
        out = flash_attn_varlen_func(*tokens, *_lengths(q, k, documents), **options)
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
        q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, scale: float | None
    ) -> Tensor:
        lengths = _lengths(q, k, documents)
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # all before, none after
        if "enable_gqa" in known:  # without it torch 2.11 takes grouped keys as they come
            options["enable_gqa"] = q.shape[2] != k.shape[2]
        tokens = (x.flatten(0, 1) for x in (q, k, v))
        return _like(varlen_attn(*tokens, *lengths, **options), q)

    return run


def load_sdpa() -> Backend:
    """scaled_dot_product_attention, with a (N, M) mask for each row where documents are packed."""
    return _sdpa


def _sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, scale: float | None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[2] != k.shape[2]}
    if documents is None:
        out = attend_last(query, key, value, **options)
    else:
        out = attend_documents(query, key, value, documents, **options)
    return _like(out.transpose(1, 2), q)


def _lengths(q: Tensor, k: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor, int, int]:
    """Boundaries of the documents among the queries and among the keys, and bounds of their length.

    No document is longer. To know the longest would be to wait for the device.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    if documents is None:
        run = None if num_queries == num_keys else (num_keys - num_queries, num_keys)
        documents = boundaries(None, len(k), num_keys, run, k.device)[0]
    return documents[0].flatten(), documents[-1].flatten(), num_queries, num_keys


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
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    *,
    is_packed: bool = True,
    flash: str | None = None,
) -> Backend:
    """The backend for such inputs. Logged at INFO, once. Raises IlmCompileError if a forced one
    cannot compute them.

    is_packed: rows have documents in them. Where each is one, torch's SDPA is the best: it needs no
    boundaries and no mask, repeats no keys, and takes cuDNN's kernel on Hopper. flash: of
    `flash_version`; what stands behind torch's varlen attention then goes before flash-attn's.
    """
    visible = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(device) if visible else None
    passed_over: list[str] = []
    first = "sdpa" if not is_packed else "varlen" if flash else "flash_attn"
    for name, load in {first: BACKENDS[first], **BACKENDS}.items():
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
    options = {"is_packed": cu_seqlens is not None, "flash": flash_version()}
    backend = choose(q.dtype, q.shape[3], q.device, **options)
    batch, num_tokens = k.shape[:2]
    query, key, value = (fold(x, cu_seqlens) for x in (q, k, v))
    runs = runs_of(tokens, num_tokens, batch if is_flat(cu_seqlens) else 1)
    made: Sequence[Tensor | None] = [None] * len(runs)
    if cu_seqlens is not None:
        made = boundaries(cu_seqlens, batch, num_tokens, tokens, q.device).unbind()
    if tokens is None:
        return _like(backend(query, key, value, made[0], scale), q)
    found, here = [], 0
    for (start, stop), documents in zip(runs, made, strict=True):
        asked, here = query[:, here : here + stop - start], here + stop - start
        found.append(backend(asked, key[:, :stop], value[:, :stop], documents, scale))
    return _like(torch.cat(found, 1), q)
