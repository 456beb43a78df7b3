"""Weights of any format into a parallel model, each rank reading only what it holds."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from ilm_compile.convert.formats import open_weights
from ilm_compile.runtime import Parallel
from ilm_compile.runtime.checkpoint.agreement import together
from ilm_compile.runtime.checkpoint.restore import fill_model


def load_weights(
    parallel: Parallel,
    model: nn.Module,
    path: str | Path,
    format_name: str = "hf",
    *,
    allow_change: Collection[str] = (),
) -> None:
    """Load the weights of `model` at `path` into `parallel`, which was compiled from `model`.

    format_name, allow_change: as for `open_weights`. They are cast to the dtypes of the parameters.
    Collective; raises `IlmCompileError` on every rank if they are not those of such a model, before
    anything is changed.
    """
    with together(parallel.mesh, f"load {path}"):
        source = open_weights(model, path, format_name, allow_change=allow_change)
    with together(parallel.mesh, f"load {path}"):
        fill_model(source.read, parallel)
