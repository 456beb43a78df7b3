"""Plans that the equality of context and expert parallelism is shown under, beside every axis."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from math import prod
from typing import Any

from tests.support.equality import Case

# (of the axis, tp, pp, dp): alone, beside one other axis each, beside two.
SIZES = [(2, 1, 1, 1), (4, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2), (2, 2, 2, 1)]
MODELS = {
    "cp": (
        *("internlm", "internlm2", "Llama", "GPT-2", "Qwen3", "Mistral", "Phi-3", "Falcon"),
        *("BLOOM", "OLMo-2"),
    ),
    "ep": (
        *("Mixtral", "Qwen3-MoE", "OLMoE", "DeepSeek-V3", "GLM-4-MoE", "GPT-OSS", "Granite-MoE"),
        *("Llama-4", "MiniMax", "Qwen2-MoE"),
    ),
}


def cases(model: str, axis: str) -> dict[int, list[Case]]:
    """Return every plan of `axis` for one model, by the number of processes that it needs."""
    found: dict[int, list[Case]] = {}
    for sizes in SIZES:
        found.setdefault(prod(sizes), []).append(case(model, axis, sizes))
    return found


def each_once(models: Sequence[str], plans: Sequence[dict[str, Any]], world: int) -> list[Case]:
    """Return a case of each plan, under one model after the other, and dp filling the world."""
    pairs = zip(cycle(models), plans, strict=False)
    sizes = [prod(plan.get(axis, 1) for axis in ("cp", "ep", "tp", "pp")) for plan in plans]
    return [
        Case(model, plan, world // size) for (model, plan), size in zip(pairs, sizes, strict=True)
    ]


def case(model: str, axis: str, sizes: tuple[int, ...]) -> Case:
    """Return one model under one of `SIZES`, with micro-batches of unequal numbers of targets."""
    size, tp, pp, dp = sizes
    beside = {name: n for name, n in (("tp", tp), ("pp", pp)) if n > 1}
    plan: dict[str, Any] = {axis: size, **beside, "num_microbatches": 3 if pp > 1 else 2}
    return Case(model, plan, dp)
