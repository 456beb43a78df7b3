"""A rank's part of a reduction over a sharded dimension, where the op alone would not give it."""

from __future__ import annotations

from torch import Tensor

from ilm_compile.program.communicator import communicator
from ilm_compile.program.functions import graph_function

NONE, MEAN, SUM = 0, 1, 2  # ATen's encoding of a loss's reduction


@graph_function()
def partial_mean(x: Tensor, dims: list[int], keepdim: bool, axis: str) -> Tensor:
    """Return this rank's part of a mean over `dims`, one of which is sharded over `axis`.

    The result has placement P.
    """
    return x.mean(dims, keepdim) / communicator(axis).size
