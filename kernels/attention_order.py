"""Which of its kernels torch's attention takes: cuDNN's first on Hopper; FlashAttention-3 or -4.

Both by switches of torch itself: `sdpa_kernel` with an order, and `activate_flash_attention_impl`,
which puts another FlashAttention behind SDPA and varlen attention alike.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import attention

from ilm_compile.errors import IlmCompileError

# The major compute capabilities that each can run on (torch.nn.attention._fa3 and ._fa4).
FLASH_VERSIONS: dict[str, tuple[int, ...]] = {"FA3": (9,), "FA4": (9, 10)}
CUDNN_FIRST = (9, 0)  # from here on it is the faster one

_ENABLED: dict[str, Callable[[], bool]] = {
    "CUDNN_ATTENTION": torch.backends.cuda.cudnn_sdp_enabled,
    "FLASH_ATTENTION": torch.backends.cuda.flash_sdp_enabled,
    "EFFICIENT_ATTENTION": torch.backends.cuda.mem_efficient_sdp_enabled,
    "MATH": torch.backends.cuda.math_sdp_enabled,
}


def attention_order(device: torch.device) -> AbstractContextManager[object]:
    """Within it torch's SDPA on `device` takes the first of our order that can compute an input.

    FlashAttention if `set_flash_attention` chose another, else cuDNN's from Hopper on; before, and
    on the CPU, torch's own order. A kernel that was switched off stays so.
    """
    if device.type != "cuda":
        return nullcontext()
    names = [name for name, is_enabled in _ENABLED.items() if is_enabled()]
    if flash_version() is not None:
        names.sort(key=lambda name: name != "FLASH_ATTENTION")
    elif torch.cuda.get_device_capability(device) < CUDNN_FIRST:
        return nullcontext()
    order = [getattr(attention.SDPBackend, name) for name in names]
    return attention.sdpa_kernel(order, set_priority=True)


def flash_version() -> str | None:
    """What stands in the place of torch's own FlashAttention-2: "FA3", "FA4", or None."""
    return attention.current_flash_attention_impl()


def set_flash_attention(name: str | None) -> None:
    """Compute torch's flash attention by FlashAttention-3 or -4 from now on; None: by torch's own.

    name: "FA3" or "FA4". For all CUDA devices of this process. Raises IlmCompileError for another
    name, where torch finds no CUDA device or one that it cannot run on, and if its package is not
    installed.
    """
    if name is None:
        if flash_version() is not None:
            attention.restore_flash_attention_impl()
        return
    if name not in FLASH_VERSIONS:
        raise IlmCompileError(
            f"set_flash_attention: expected {' or '.join(FLASH_VERSIONS)}, or None; got {name!r}"
        )
    if not torch.cuda.is_available():
        raise IlmCompileError(
            f"set_flash_attention: {name} needs a CUDA device, and torch finds none; the CPU has "
            "one attention only: leave flash_attention out"
        )
    capability = torch.cuda.get_device_capability()
    if capability[0] not in (runs_on := FLASH_VERSIONS[name]):
        raise IlmCompileError(
            f"set_flash_attention: {name} needs compute capability "
            f"{' or '.join(f'{major}.x' for major in runs_on)}, here is "
            f"{capability[0]}.{capability[1]}; leave flash_attention out"
        )
    try:
        attention.activate_flash_attention_impl(name)
    except (ImportError, RuntimeError, ValueError) as error:
        raise IlmCompileError(
            f"set_flash_attention: torch {torch.__version__} cannot take {name}: {error}; install "
            "its package, or leave flash_attention out"
        ) from error
