"""What a difference depends on, where no single node shows it: the plan, made plainer bit by bit.

A program whose every node is right on one micro-batch can still train wrongly: a loss averaged
over micro-batches, a schedule, a recomputed block, a copy of a tied weight that is left out. The
step is then taken again with one thing simpler at a time; what makes it right names the culprit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ilm_compile.program.plan import Plan

# What is tried: words for the report, and the changes of the plan.
IGNORED = -100  # cross entropy's default label of what is no target
SIMPLER: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("one micro-batch", "num_microbatches", {"num_microbatches": 1}),
    (
        "one pipeline stage",
        "pp",
        {"pp": 1, "num_chunks": 1, "schedule": "1f1b"},
    ),
    (
        "one tensor-parallel rank",
        "tp",
        {"tp": 1, "sequence_parallel": None, "async_tensor_parallel": False, "constraints": ()},
    ),
    ("one context-parallel rank", "cp", {"cp": 1, "cp_attention": None}),
    ("no recomputed blocks", "checkpoint", {"checkpoint": False}),
)
EQUAL_TARGETS = "equal numbers of targets in all micro-batches"
MEANINGS = {
    "one micro-batch": "micro-batches are accumulated or normalised wrongly",
    EQUAL_TARGETS: "the loss is averaged per micro-batch instead of over all targets",
    "one pipeline stage": "stages, what they send each other, or copies of a tied parameter",
    "one tensor-parallel rank": "a collective or an op that depends on the rank",
    "one context-parallel rank": "a collective over tokens, or an op that depends on their order",
    "no recomputed blocks": "recomputing a block does not give the same values",
}


def narrow(
    plan: Plan,
    batch: Mapping[str, Tensor],
    is_right: Callable[[Plan, Mapping[str, Tensor]], bool],
) -> str:
    """Return which simpler plan or batch makes the step right, and what that means."""
    found = []
    for words, name, changes in SIMPLER:
        is_simpler = getattr(plan, name) != getattr(Plan(), name)
        if is_simpler and is_right(plan.replace(**changes), batch):
            found.append(words)
    if "labels" in batch:
        whole = {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == IGNORED, 0)}
        if is_right(plan, whole):
            found.append(EQUAL_TARGETS)
    if not found:
        return "nothing simpler is right either"
    return "; ".join(f"right with {words}: {MEANINGS[words]}" for words in found)
