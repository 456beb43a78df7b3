"""Which op computes in what under bf16 training, and why: the table behind `CastBF16`.

`CastFP16` reads float16 where it says bf16.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from ilm_compile.ops.nodes import op_name

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

PRECISIONS: dict[str, Precision] = {
    "aten::linear": PRODUCT,
    "aten::matmul": PRODUCT,
    "aten::mm": PRODUCT,
    "aten::bmm": PRODUCT,
    "aten::addmm": PRODUCT,
    "aten::baddbmm": PRODUCT,
    "aten::einsum": PRODUCT,
    "aten::_grouped_mm": PRODUCT,
    "transformers::grouped_mm_fallback": PRODUCT,
    "ilm::grouped_product": PRODUCT,
    "aten::scaled_dot_product_attention": PRODUCT,
    "ilm::attention": PRODUCT,
    "ilm::query_attention": PRODUCT,
    "ilm::query_dot_product_attention": PRODUCT,
    "ilm::rms_norm": FUSED_1,
    "ilm::qkv_rotary": FUSED_1,
    "ilm::add_rms_norm": FUSED_2,
    "ilm::rotary": FUSED_2,
    "ilm::swiglu": FUSED_2,
    "aten::rms_norm": NORM,
    "aten::layer_norm": NORM,
    "aten::group_norm": NORM,
    "aten::linalg_vector_norm": NORM,
    "aten::softmax": SOFTMAX,
    "aten::log_softmax": SOFTMAX,
    "aten::logsumexp": SOFTMAX,
    "aten::cross_entropy_loss": SOFTMAX,
    "sharded_softmax": SOFTMAX,
    "sharded_log_softmax": SOFTMAX,
    "sharded_logsumexp": SOFTMAX,
    "sharded_nll_loss": SOFTMAX,
    "partial_loss": SOFTMAX,
    "aten::nll_loss_nd": SOFTMAX,
    "aten::mse_loss": SOFTMAX,
    "aten::l1_loss": SOFTMAX,
    "aten::smooth_l1_loss": SOFTMAX,
    "aten::huber_loss": SOFTMAX,
    "aten::kl_div": SOFTMAX,
    "vocab_cross_entropy": LOSS,
    "linear_cross_entropy": HEAD,
    "output_logits": HEAD,
    "aten::pow": REDUCTION,
    "aten::mean": REDUCTION,
    "partial_mean": REDUCTION,
    "aten::sum": REDUCTION,
    "aten::var": REDUCTION,
    "aten::rsqrt": REDUCTION,
    "aten::exp": REDUCTION,
    "aten::log": REDUCTION,
    "aten::embedding": LOOKUP,
    "vocab_embedding": LOOKUP,
    "redistribute": MOVE,
    "route": MOVE,
    "aten::to": CAST,
}


# Calls that change no number: what is read through them is read as it is.
CARRIERS = {
    *("aten::reshape", "aten::transpose", "aten::permute", "aten::expand", "aten::unsqueeze"),
    *("aten::contiguous", "aten::slice", "aten::select", "getitem", "redistribute"),
    *("sort_rows", "unsort_rows", "route"),
}


def precision_of(node: fx.Node, parameter_free: Collection[fx.Node]) -> Precision:
    """Return the row of a call; `parameter_free` holds the nodes that no parameter reaches."""
    return EXACT if node in parameter_free else PRECISIONS.get(called_name(node), FOLLOW)


def called_name(node: fx.Node) -> str:
    """Return the op's name, such as ``aten::linear``, or that of the python function."""
    return op_name(node) or str(getattr(node.target, "__name__", node.target))
