"""One or more calls per op that has a placement rule: what the proof by execution runs.

Integer and boolean tensors are made so that every op is well defined; sizes divide by 2 and by 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import ilm_compile.sharding  # noqa: F401 - registers ilm.attention
from ilm_compile.program.counts import count_classes
from ilm_compile.program.dropout import seeded_dropout
from ilm_compile.program.expert_rows import expert_order, sort_rows, unsort_rows
from ilm_compile.program.ring_products import gather_products, product_scatter

aten, ilm = torch.ops.aten, torch.ops.ilm
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape)


def permutations(rows: int, n: int) -> torch.Tensor:
    return torch.rand(rows, n).argsort(1)


def angles(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.cos(), x.sin()


def mask(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) > 0.4


def call(*args: Any, **kwargs: Any) -> Arguments:
    return args, kwargs


UNARY = (
    *("neg", "clone", "contiguous", "detach", "relu", "silu", "gelu", "tanh", "sigmoid", "exp"),
    *("cos", "sin", "abs", "softplus", "leaky_relu", "erf", "square", "log1p", "expm1"),
    *("log_sigmoid", "relu6", "hardtanh", "elu", "mish", "sign", "floor", "round"),
    *("zeros_like", "ones_like"),
)
POSITIVE = ("log", "log1p", "rsqrt", "sqrt", "reciprocal")
COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")
BOOLEAN = (
    *(aten.__and__.Tensor, aten.__or__.Tensor, aten.logical_and.default),
    *(aten.logical_or.default, aten.bitwise_and.Tensor),
)
BROADCAST = (
    *(aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor),
    *(aten.maximum.default, aten.minimum.default, aten.pow.Tensor_Tensor),
)

SAMPLES: dict[Any, list[Callable[[], Arguments]]] = {
    **{getattr(aten, name).default: [lambda: call(x(4, 8))] for name in UNARY if name != "log1p"},
    **{getattr(aten, name).default: [lambda: call(positive(4, 8))] for name in POSITIVE},
    **{getattr(aten, n).Tensor: [lambda: call(x(4, 8), x(8))] for n in COMPARE},
    **{getattr(aten, n).Scalar: [lambda: call(x(4, 8), 0.1)] for n in COMPARE},
    **{op: [lambda: call(mask(4, 8), mask(8))] for op in BOOLEAN},
    **{
        op: [
            lambda: call(positive(4, 8), positive(4, 8)),
            lambda: call(positive(4, 1, 8), positive(4, 1)),
        ]
        for op in BROADCAST
    },
    aten.mul.Scalar: [lambda: call(x(4, 8), 3.0)],
    aten.div.Scalar: [lambda: call(x(4, 8), 3.0)],
    aten.add.Scalar: [lambda: call(x(4, 8), 3.0)],
    aten.sub.Scalar: [lambda: call(x(4, 8), 3.0)],
    aten.rsub.Scalar: [lambda: call(x(4, 8), 3.0)],
    aten.pow.Tensor_Scalar: [lambda: call(x(4, 8), 2)],
    aten.pow.Scalar: [lambda: call(2.0, x(4, 8))],
    aten.clamp.default: [lambda: call(x(4, 8), -0.5, 0.5)],
    aten.clamp_min.default: [lambda: call(x(4, 8), -0.5)],
    aten.clamp_max.default: [lambda: call(x(4, 8), 0.5)],
    aten.remainder.Scalar: [lambda: call(x(4, 8), 0.3)],
    aten.full_like.default: [lambda: call(x(4, 8), 3.0)],
    aten.to.dtype: [lambda: call(x(4, 8), torch.float32)],
    aten.logical_not.default: [lambda: call(mask(4, 8))],
    aten.bitwise_not.default: [lambda: call(mask(4, 8))],
    aten.where.self: [lambda: call(mask(4, 8), x(4, 8), x(8))],
    aten.where.ScalarOther: [lambda: call(mask(4, 8), x(4, 8), 1.0)],
    aten.where.ScalarSelf: [lambda: call(mask(4, 8), 1.0, x(4, 8))],
    aten.where.Scalar: [lambda: call(mask(4, 8), 1.0, 2.0)],
    aten.masked_fill.Scalar: [lambda: call(x(4, 8), mask(4, 8), 1.0)],
    aten.masked_fill.Tensor: [lambda: call(x(4, 8), mask(4, 8), x())],
    aten.index.Tensor: [
        lambda: call(x(4, 8, 4), [integers(4, 6)]),
        lambda: call(x(4, 8, 4), [None, integers(8, 2, 6)]),
        lambda: call(x(4, 8, 4), [None, integers(8, 6), integers(4, 6)]),
        lambda: call(x(4, 8, 4), [integers(4, 6), None, integers(4, 6)]),
    ],
    aten.gather.default: [
        lambda: call(x(4, 8), 1, integers(8, 4, 6)),
        lambda: call(x(4, 8), 0, integers(4, 2, 4)),
        lambda: call(x(2, 4, 8), -1, integers(8, 2, 4, 1)),
    ],
    aten.index_select.default: [lambda: call(x(4, 8), 1, integers(8, 6))],
    aten.slice_scatter.default: [
        lambda: call(x(4, 8), x(4, 3), 1, 2, 5),
        lambda: call(x(4, 8), x(2, 8), 0, 1, 3),
    ],
    aten.select_scatter.default: [
        lambda: call(x(4, 8, 4), x(4, 4), 1, 3),
        lambda: call(x(4, 8, 4), x(8, 4), 0, -1),
    ],
    aten.scatter.src: [lambda: call(x(4, 8), 1, permutations(4, 8), x(4, 8))],
    aten.scatter.value: [lambda: call(x(4, 8), 1, permutations(4, 8)[:, :3], 1.0)],
    aten.scatter_add.default: [
        lambda: call(x(4, 8), 1, integers(8, 4, 6), x(4, 6)),
        lambda: call(x(4, 8), 0, integers(4, 2, 8), x(2, 8)),
    ],
    aten.index_add.default: [lambda: call(x(4, 8), 0, integers(4, 6), x(6, 8))],
    aten.index_copy.default: [lambda: call(x(4, 8), 1, torch.tensor([5, 2]), x(4, 2))],
    aten.index_put.default: [
        lambda: call(x(4, 8, 4), [torch.tensor([3, 1])], x(2, 8, 4)),
        lambda: call(x(4, 8, 4), [None, integers(8, 2, 6)], x(4), True),
        lambda: call(x(4, 8, 4), [mask(4, 8)], x()),
        lambda: call(x(4, 8, 4), [None, integers(8, 6), integers(4, 6)], x(4, 6), True),
        lambda: call(x(4, 8, 4), [integers(4, 6), None, integers(4, 6)], x(6, 8), True),
    ],
    aten.conv1d.default: [
        lambda: call(x(4, 8, 6), x(8, 1, 3), x(8), [1], [2], [1], 8),
        lambda: call(x(4, 8, 6), x(8, 1, 3), groups=8),
        lambda: call(x(4, 8, 6), x(16, 2, 3), x(16), groups=4),
        lambda: call(x(4, 8, 6), x(12, 8, 3), x(12)),
    ],
    aten.conv1d.padding: [lambda: call(x(4, 8, 6), x(8, 1, 3), x(8), [1], "same", [1], 8)],
    aten.conv2d.default: [lambda: call(x(4, 8, 6, 6), x(12, 8, 3, 3), x(12))],
    aten.conv2d.padding: [lambda: call(x(4, 8, 6, 6), x(8, 1, 3, 3), None, [1], "same", [1], 8)],
    **{
        name: [lambda: call(x(6, 8), x(3, 8, 12), torch.tensor([2, 2, 6], dtype=torch.int32))]
        for name in ("transformers::grouped_mm_fallback", "ilm::grouped_product")
    },
    expert_order: [lambda: call(integers(3, 8))],
    sort_rows: [
        lambda: call(x(8, 4), torch.randperm(8), 1),
        lambda: call(x(4, 8), torch.randperm(8), 2),
        lambda: call(integers(5, 8), torch.randperm(8), 1),
    ],
    unsort_rows: [
        lambda: call(x(8, 4), torch.randperm(8)),
        lambda: call(integers(5, 8), torch.randperm(8)),
    ],
    aten.argsort.default: [lambda: call(x(4, 8), -1, True), lambda: call(x(4, 8), 0)],
    aten.histc.default: [
        lambda: call(integers(4, 8).double(), 4, 0, 3),
        lambda: call(torch.arange(8).double(), 4),
    ],
    count_classes: [
        lambda: call(torch.arange(8) % 4, None, 4),
        lambda: call(torch.arange(8) % 4, torch.arange(8).double(), 4),
    ],
    seeded_dropout: [lambda: call(x(4, 8), torch.tensor(5), 0.5, 0, "I")],
    aten.linear.default: [
        lambda: call(x(2, 4, 8), x(12, 8)),
        lambda: call(x(2, 4, 8), x(12, 8), x(12)),
        lambda: call(x(4, 8), x(12, 8), x(12)),
    ],
    aten.matmul.default: [
        lambda: call(x(2, 4, 8), x(8, 12)),
        lambda: call(x(2, 4, 8), x(2, 8, 4)),
        lambda: call(x(2, 2, 4, 8), x(2, 2, 8, 4)),
        lambda: call(x(8), x(8, 4)),
        lambda: call(x(2, 4, 4, 8), x(4, 8, 4)),
        lambda: call(x(4, 1, 4, 8), x(1, 4, 8, 4)),
    ],
    aten.mm.default: [lambda: call(x(4, 8), x(8, 12))],
    aten.einsum.default: [
        lambda: call("bshd,bthd->bhst", [x(2, 3, 4, 8), x(2, 5, 4, 8)]),
        lambda: call("...k,nk->...n", [x(2, 4, 8), x(12, 8)]),
        lambda: call("...hk,kn->...n", [x(2, 4, 8), x(8, 12)]),
        lambda: call("abc,c->ab", [x(2, 4, 8), x(8)]),
        lambda: call("ij,j,jk->ik", [x(4, 8), x(8), x(8, 4)]),
    ],
    aten.bmm.default: [lambda: call(x(2, 4, 8), x(2, 8, 4))],
    aten.addmm.default: [
        lambda: call(x(12), x(4, 8), x(8, 12)),
        lambda: call(x(4, 12), x(4, 8), x(8, 12)),
    ],
    aten.baddbmm.default: [lambda: call(x(2, 4, 4), x(2, 4, 8), x(2, 8, 4))],
    aten.softmax.int: [lambda: call(x(4, 8), -1), lambda: call(x(4, 8), 0)],
    aten.log_softmax.int: [
        lambda: call(x(4, 8), 1),
        lambda: call(100 * x(4, 8), -1, torch.float64),
        lambda: call(x(4, 8, 4), 0),
    ],
    aten.cumsum.default: [lambda: call(x(4, 8), 0)],
    aten.cumprod.default: [lambda: call(x(4, 8), 0)],
    aten.tril.default: [lambda: call(x(4, 8, 8), -1)],
    aten.triu.default: [lambda: call(x(4, 8, 8))],
    aten.flip.default: [lambda: call(x(4, 8), [1])],
    aten.roll.default: [lambda: call(x(4, 8), [1], [0]), lambda: call(x(4, 8), [1])],
    aten.pad.default: [lambda: call(x(4, 8, 8), [1, 2]), lambda: call(x(4, 8, 8), [0, 0, 3, 0])],
    aten.constant_pad_nd.default: [lambda: call(x(4, 8, 8), [1, -2], 1.0)],
    aten.rms_norm.default: [
        lambda: call(x(2, 4, 8), [8], x(8), 1e-5),
        lambda: call(x(2, 4, 8), [8]),
    ],
    aten.layer_norm.default: [lambda: call(x(2, 4, 8), [8], x(8), x(8), 1e-5)],
    ilm.rms_norm.default: [
        lambda: call(x(2, 4, 8), x(8), 1e-5),
        lambda: call(x(2, 4, 8), None, 1e-5),
        lambda: call(x(2, 4, 4, 8), x(8), 1e-5, False, 1.0),
    ],
    ilm.add_rms_norm.default: [
        lambda: call(x(2, 4, 8), x(2, 4, 8), x(8), 1e-5),
        lambda: call(x(2, 4, 8), x(2, 4, 8), None, 1e-5),
    ],
    ilm.layer_norm.default: [
        lambda: call(x(2, 4, 8), x(8), x(8), 1e-5),
        lambda: call(x(2, 4, 4, 8), None, None, 1e-5),
    ],
    ilm.add_layer_norm.default: [
        lambda: call(x(2, 4, 8), x(2, 4, 8), x(8), x(8), 1e-5),
        lambda: call(x(2, 4, 8), x(2, 4, 8), x(8), None, 1e-5),
    ],
    ilm.rotary.default: [
        lambda: call(x(2, 4, 8, 6), x(2, 4, 4, 6), *angles(x(1, 4, 3))),
        lambda: call(x(4, 4, 4, 6), x(4, 4, 2, 6), *angles(x(4, 4, 2)), None, True),
        lambda: call(x(4, 4, 4, 6), x(4, 4, 4, 6), *angles(x(8, 3)), integers(8, 4, 4)),
        lambda: call(x(4, 4, 4, 6), x(4, 4, 4, 6), *angles(x(4, 3)), integers(4, 1, 4)),
    ],
    ilm.qkv_rotary.default: [
        lambda: call(x(2, 4, 4, 5, 6), *angles(x(1, 4, 3))),
        lambda: call(x(4, 4, 4, 3, 6), *angles(x(4, 4, 2)), None, True),
        lambda: call(x(4, 4, 4, 3, 6), *angles(x(8, 3)), integers(8, 4, 4)),
    ],
    ilm.glu.default: [
        lambda: call(x(2, 4, 8), x(2, 4, 8)),
        lambda: call(x(2, 4, 8), x(2, 4, 8), "gelu_tanh"),
    ],
    aten.sum.default: [lambda: call(x(4, 8))],
    aten.sum.dim_IntList: [lambda: call(x(2, 4, 8), [-1]), lambda: call(x(2, 4, 8), [1], True)],
    aten.mean.default: [lambda: call(x(4, 8))],
    aten.amax.default: [
        lambda: call(x(2, 4, 8), [-1]),
        lambda: call(x(2, 4, 8), [0], True),
        lambda: call(x(4, 8).round(), [0, 1]),  # equal ones share the gradient
    ],
    aten.amin.default: [lambda: call(x(2, 4, 8), [-1])],
    aten.logsumexp.default: [
        lambda: call(x(2, 4, 8), [-1], True),
        lambda: call(100 * x(2, 4, 8), [-1]),
        lambda: call(x(4, 8), [1, 0]),
    ],
    aten.argmax.default: [
        lambda: call(x(2, 4, 8).round(), -1),
        lambda: call(x(4, 8), 0, True),
        lambda: call(x(4, 8)),
    ],
    aten.var.correction: [lambda: call(x(2, 4, 8), [-1], correction=0, keepdim=True)],
    aten.var.dim: [lambda: call(x(2, 4, 8), [-1], False, True), lambda: call(x(2, 4, 8), [1])],
    aten.prod.dim_int: [lambda: call(x(2, 4, 8), 1), lambda: call(x(2, 4, 8), -1, True)],
    aten.linalg_vector_norm.default: [
        lambda: call(x(2, 4, 8), 2, [-1], True),
        lambda: call(x(2, 4, 8), 2, [1]),
    ],
    aten.mean.dim: [lambda: call(x(2, 4, 8), [-1], True), lambda: call(x(2, 4, 8), [0])],
    aten.reshape.default: [
        lambda: call(x(2, 4, 24), [2, 4, 3, 4, 2]),
        lambda: call(x(2, 4, 3, 4, 2), [2, 4, 24]),
        lambda: call(x(2, 4, 8), [8, 8]),
        lambda: call(x(8, 8), [2, 4, 8]),
        lambda: call(x(1, 4, 8), [4, 8]),
        lambda: call(x(6, 4), [3, 8]),
        lambda: call(x(4, 6), [6, 4]),
        lambda: call(x(2, 4, 6), [2, 4, 1, 6]),
    ],
    aten.expand.default: [
        lambda: call(x(2, 1, 8), [2, 4, 8]),
        lambda: call(x(4, 8), [2, 4, 8]),
    ],
    aten.permute.default: [lambda: call(x(2, 4, 8), [2, 0, 1])],
    aten.transpose.int: [lambda: call(x(2, 4, 8), 1, -1)],
    aten.t.default: [lambda: call(x(4, 8))],
    aten.unsqueeze.default: [lambda: call(x(4, 8), 1), lambda: call(x(4, 8), -1)],
    aten.squeeze.dim: [lambda: call(x(4, 1, 8), 1), lambda: call(x(4, 2, 8), 1)],
    aten.select.int: [lambda: call(x(4, 3, 8), 1, -1)],
    aten.slice.Tensor: [
        lambda: call(x(4, 8), 1, 0, 4),
        lambda: call(x(4, 8), 1, 4, 2**63 - 1),
        lambda: call(x(4, 8), 1, 0, 8, 2),
        lambda: call(x(4, 8), 0, 1, 3),
    ],
    aten.cat.default: [
        lambda: call([x(4, 8), x(4, 4)], -1),
        lambda: call([x(2, 8), x(4, 8)], 0),
        lambda: call([x(4, 8), x(4, 8)], 1),
    ],
    aten.stack.default: [lambda: call([x(4, 8), x(4, 8)], 1)],
    aten.embedding.default: [
        lambda: call(x(8, 4), integers(8, 2, 6)),
        lambda: call(x(8, 4), integers(8, 2, 6), 3),
    ],
    aten.cross_entropy_loss.default: [
        lambda: call(x(6, 8), integers(8, 6)),
        lambda: call(x(6, 8), integers(8, 6), None, 2, 3),
        lambda: call(x(6, 8), integers(8, 6), None, 1, 3, 0.1),
        lambda: call(x(6, 8), integers(8, 6), None, 0, 3),
        lambda: call(x(4, 8), integers(8, 4), None, 0),
        lambda: call(x(2, 8, 4), integers(8, 2, 4), None, 0, 3, 0.1),
        lambda: call(x(2, 8, 4), integers(8, 2, 4), None, 2, 3),
    ],
    aten.nll_loss_nd.default: [
        lambda: call(x(6, 8), integers(8, 6)),
        lambda: call(x(6, 8), integers(8, 6), None, 2, 3),
        lambda: call(x(2, 8, 4), integers(8, 2, 4), None, 0, 3),
        lambda: call(x(2, 8, 4), integers(8, 2, 4), None, 1, 3),
    ],
    **{
        op: [
            lambda: call(x(4, 8), x(4, 8)),
            lambda: call(x(4, 8), x(4, 8), 2),
            lambda: call(x(4, 8), x(4, 8), 0),
        ]
        for op in (aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default)
    },
    aten.huber_loss.default: [
        lambda: call(x(4, 8), x(4, 8), 1, 0.5),
        lambda: call(x(4, 8), x(4, 8), 2, delta=0.5),
    ],
    aten.kl_div.default: [
        lambda: call(x(4, 8), positive(4, 8)),
        lambda: call(x(4, 8), x(4, 8), 1, log_target=True),
        lambda: call(x(4, 8), positive(4, 8), 2),
        lambda: call(x(4, 8), positive(4, 8), 0),
    ],
    ilm.attention.default: [
        lambda: call(x(2, 8, 8, 4), x(2, 8, 4, 4), x(2, 8, 4, 4)),
        lambda: call(
            *(x(2, 8, 8, 4), x(2, 8, 4, 4), x(2, 8, 4, 4)),
            torch.tensor([[0, 2, 7, 8], [0, 3, 4, 8]], dtype=torch.int32),
        ),
        lambda: call(  # a document over both rows, and queries that ranks do not divide by heads
            *(x(2, 8, 3, 4), x(2, 8, 1, 4), x(2, 8, 1, 4)),
            torch.tensor([0, 3, 13], dtype=torch.int32),
            0.3,
        ),
    ],
    gather_products: [
        lambda: call(x(2, 8, 4), [x(12, 4)], [None], 1, "tp"),
        lambda: call(x(8, 4), [x(8, 4), x(12, 4)], [x(8), None], 0, "tp"),
        lambda: call(x(1, 8, 4), [x(8, 4), x(4, 4)], [None, x(4)], 1, "tp"),
    ],
    product_scatter: [
        lambda: call(x(2, 8, 4), x(12, 4), None, 1, "tp"),
        lambda: call(x(8, 4), x(12, 4), x(12), 0, "tp"),
    ],
    aten.scaled_dot_product_attention.default: [
        lambda: call(x(2, 4, 8, 8), x(2, 4, 8, 8), x(2, 4, 8, 8), None, 0.0, True),
        lambda: call(
            x(2, 4, 8, 8), x(2, 4, 8, 8), x(2, 4, 8, 8), mask(2, 1, 8, 8) | torch.eye(8).bool()
        ),
        lambda: call(x(2, 4, 8, 8), x(2, 4, 8, 8), x(2, 4, 8, 8), x(4, 8, 8)),
        lambda: call(x(2, 4, 8, 8), x(2, 4, 8, 8), x(2, 4, 8, 8), mask(2, 1, 1, 8)),
        lambda: call(
            *(x(2, 6, 8, 8), x(2, 3, 8, 8), x(2, 3, 8, 4), None, 0.0, True),
            scale=0.3,
            enable_gqa=True,
        ),
        lambda: call(x(2, 4, 8, 8), x(2, 4, 6, 8), x(2, 4, 6, 8)),  # other keys than queries
        lambda: call(x(2, 4, 8, 8), x(2, 4, 6, 8), x(2, 4, 6, 8), None, 0.0, True),
    ],
}
