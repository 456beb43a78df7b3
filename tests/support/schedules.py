"""Every pipeline schedule, what it may be asked beside it, and how often blocks run under it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import ilm_compile
from ilm_compile.errors import PlanError
from ilm_compile.program.lowered import Stage
from ilm_compile.rewrite.stage_module import Recomputed

SPLIT = {"zb_h1": 1, "zb_h2": 1, "zb_v": 2, "dualpipe_v": 2, "v_half": 2, "v_min": 2}
CHECKPOINTS = (False, True, "auto", "selective")


def recompute(checkpoint: bool | str, model: nn.Module, **options: Any) -> dict[str, Any]:
    """Return the plan's fields for `checkpoint`; "auto" has memory for some blocks, not for all.

    options: of `partition`.
    """
    if checkpoint != "auto":
        return {"checkpoint": checkpoint}
    found = ilm_compile.partition(model, checkpoint="auto", **options).decisions
    most = max(map(float, re.findall(r"([\d.]+) MiB", next(d for d in found if "peaks" in d))))
    with pytest.raises(PlanError) as refusal:
        ilm_compile.partition(model, checkpoint="auto", memory=1, **options)
    [least] = re.findall(r"needs ([\d.]+) MiB", str(refusal.value))
    return {"checkpoint": "auto", "memory": f"{(most + 3 * float(least)) / 4:.3f}MiB"}


@contextmanager
def block_runs() -> Iterator[Counter[str]]:
    """Count how often each part of a block runs in here, by its name in a stage, on all ranks."""
    runs: Counter[str] = Counter()

    def count(module: nn.Module, _: object) -> None:
        first, *_ = [*(name for name, _ in module.named_parameters()), ""]
        # Flat names are a region's own; a stage, and what recomputes a region, have theirs behind
        # those of their children.
        if first.startswith("layers_") and "." not in first:
            runs["_".join(first.split("_")[:2])] += 1

    with register_module_forward_pre_hook(count):
        yield runs


def planned_runs(stages: Iterable[Stage], num_microbatches: int) -> Counter[str]:
    """Return how often they shall: once a micro-batch, and once more where all is recomputed."""
    runs: Counter[str] = Counter()
    for stage in stages:
        for name, region in stage.module.named_children():
            if name.startswith("layers_"):
                runs["_".join(name.split("_")[:2])] += num_microbatches * (
                    2 if isinstance(region, Recomputed) else 1
                )
    return runs
