"""Rows that lie further apart than 32 bits count: a slice of a long fused projection has such.

The tensors are holes in a sparse file, so that gigabytes cost nothing. Runs in the interpreter,
which computes in the widths that the kernel names, as a GPU does.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import relative_error
from tests.kernels.worker import Worker

WIDTH = 64
STRIDE = 2**30  # of a row: the third begins at element 2^31
NUM_ROWS = 3
ANGLES = torch.rand(1, NUM_ROWS, 8) * 6
TURNS = (ANGLES.cos(), ANGLES.sin(), None, False)
TARGET = torch.tensor([-100, 3, 70])
CALLS = {
    "rms_norm": ("triton_rms_norm", 1, (None, 1e-5, False, 0.0)),
    "rms_norm_backward": ("triton_rms_norm", 2, (None, 1e-5, False, 0.0)),
    "add_rms_norm": ("triton_rms_norm", 2, (None, 1e-5, False, 0.0)),
    "add_rms_norm_backward": ("triton_rms_norm", 3, (None, 1e-5, False, 0.0)),
    "layer_norm": ("triton_layer_norm", 1, (None, None, 1e-5)),
    "add_layer_norm": ("triton_layer_norm", 2, (None, None, 1e-5)),
    "layer_norm_backward": ("triton_layer_norm", 3, (None, False, 1e-5)),
    "glu": ("triton_glu", 2, ("silu",)),
    "glu_backward": ("triton_glu", 3, ("silu",)),
    "rotary": ("triton_rotary", 2, TURNS),
    "rotary_backward": ("triton_rotary", 2, TURNS),
    "qkv_rotary": ("triton_qkv_rotary", 1, TURNS),
    "qkv_rotary_backward": ("triton_qkv_rotary", 3, TURNS),
    "vocab_statistics": ("triton_vocab_loss", 1, (TARGET, WIDTH, -100, 3 * WIDTH)),
    "vocab_cross_entropy_backward": (
        *("triton_vocab_loss", 1),
        (TARGET, torch.ones(NUM_ROWS), torch.ones(NUM_ROWS), WIDTH, -100, 0.1, 3 * WIDTH),
    ),
}
# What an op takes of a row: heads, or groups of heads.
SHAPES = {
    "triton_rotary": lambda x: x.unflatten(1, (4, 16)).unsqueeze(0),
    "triton_qkv_rotary": lambda x: x.unflatten(1, (4, 16)).unsqueeze(0),
    "qkv_rotary": lambda x: x.unflatten(1, (1, 4, 16)).unsqueeze(0),
}


def apart(rows: Tensor, path: str) -> Tensor:
    """The same rows with STRIDE elements from one to the next."""
    size = STRIDE * (NUM_ROWS - 1) + WIDTH
    whole = torch.from_file(path, shared=True, size=size, dtype=rows.dtype)
    return whole.as_strided((NUM_ROWS, WIDTH), (STRIDE, 1)).copy_(rows)


def launch_far(name: str, path: str) -> list[tuple[Tensor, Tensor]]:
    """Outputs for rows far apart, and for the same rows end to end."""
    import importlib

    module, num_tensors, options = CALLS[name]
    function = getattr(importlib.import_module(f"ilm_compile.kernels.{module}"), name)
    torch.manual_seed(0)
    near = [torch.randn(NUM_ROWS, WIDTH).half() for _ in range(num_tensors)]
    far = [apart(x, f"{path}.{index}") for index, x in enumerate(near)]
    shape = SHAPES.get(name) or SHAPES.get(module, lambda x: x)
    near, far = ([shape(x) for x in xs] for xs in (near, far))
    found, expected = function(*far, *options), function(*near, *options)
    if isinstance(found, Tensor):
        return [(found, expected)]
    return list(zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_rows_further_apart_than_32_bits_count(
    interpreter: Worker, tmp_path: Path, name: str
) -> None:
    target = "tests.kernels.test_far_rows:launch_far"
    for far, near in interpreter.call(target, name, str(tmp_path / "rows")):
        assert relative_error(far, near) == 0
