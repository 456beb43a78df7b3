"""In what ops compute under bf16 training, and why: what `CastBF16` inserts casts for.

`CastFP16` reads float16 where it says bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True, slots=True)
class Precision:
    """What an op's floating-point inputs, or its result, are cast to, and why.

    `values`: of an op that computes in float32 inside, how many of its inputs are activations; the
    others, weights and tables, stay as they are.
    """

    why: str
    inputs: torch.dtype | None = None
    result: torch.dtype | None = None
    values: int = 0


PRODUCT = Precision("matrix product: tensor cores, summed in float32", inputs=BF16)
HEAD = Precision("matrix product, in the dtype of its activations whatever its weight has", BF16)
NORM = Precision("norm: squares need the range, their mean the digits", inputs=FP32)
SOFTMAX = Precision("softmax and loss: differences and sums of exponentials", inputs=FP32)
LOSS = Precision("fused loss: float32 inside, reads logits as they are, gives float32")
REDUCTION = Precision("reduction, power, exponential: errors add up", inputs=FP32)
LOOKUP = Precision("lookup: the table stays as it is, the rows are rounded", result=BF16)
MOVE = Precision("moved in bf16 if all its readers want that, else as it is")
CAST = Precision("cast")
FUSED_1, FUSED_2 = (
    Precision("fused: float32 inside; in bf16 if all readers round to it, else float32", values=n)
    for n in (1, 2)
)
FOLLOW = Precision("follows its inputs by torch's type promotion")
EXACT = Precision("no parameter reaches it: rotary tables and masks stay exact")
