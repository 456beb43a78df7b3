"""A model, a plan and the machine that the tests of the step's cost share."""

from typing import Any

from ilm_compile.cost.sizes import ModelSizes, StepPlan

GPT = ModelSizes(
    hidden=2048, layers=16, heads=16, kv_heads=16, ffn=8192, ffn_matrices=2, vocab=51200
)
LLAMA = ModelSizes(hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=128256)


def plan(**changes: Any) -> StepPlan:
    """Eight sequences of 2048 tokens, one at a time."""
    return StepPlan(**{"seq": 2048, "micro_batch": 1, "num_microbatches": 8, **changes})
