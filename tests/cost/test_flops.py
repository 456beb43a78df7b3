"""FLOPs against formulas worked out by hand, and against torch's own counter."""

import pytest
import torch
from torch import fx, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from torch.utils.flop_counter import FlopCounterMode

import ilm_compile.kernels.attention  # noqa: F401  registers torch.ops.ilm.attention
from ilm_compile.cost import backward_flops, forward_flops, model_flops
from ilm_compile.models import internlm2_tiny
from ilm_compile.partitioning import partition
from ilm_compile.program.gradients import gradient_nodes
from tests.cost.graphs import (
    BATCH,
    FFN,
    HEADS,
    HIDDEN,
    KV_HEADS,
    SEQ,
    VOCAB,
    Llama,
    export,
    llama,
    meta,
    node_of,
)

TOKENS = BATCH * SEQ
GEMM_FLOPS = 2 * TOKENS * HIDDEN * (2 * HIDDEN + 2 * HIDDEN * KV_HEADS // HEADS + 3 * FFN + VOCAB)
CAUSAL_FLOPS = 2 * BATCH * SEQ**2 * HIDDEN

PRODUCTS = {
    "linear": (linear, [(2, 3, 5), (7, 5)]),
    "linear with bias": (linear, [(2, 3, 5), (7, 5), (7,)]),
    "mm": (torch.mm, [(3, 5), (5, 7)]),
    "bmm": (torch.bmm, [(2, 3, 5), (2, 5, 7)]),
    "addmm": (torch.addmm, [(7,), (3, 5), (5, 7)]),
    "baddbmm": (torch.baddbmm, [(2, 3, 7), (2, 3, 5), (2, 5, 7)]),
    "matmul": (torch.matmul, [(2, 4, 3, 5), (2, 4, 5, 7)]),
    "broadcast matmul": (torch.matmul, [(2, 4, 3, 5), (5, 7)]),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), [(2, 3, 5), (2, 5, 7)]),
    "einsum over leading": (lambda a, b: torch.einsum("ji, ...jk", a, b), [(5, 3), (4, 5, 7)]),
    "conv1d": (torch.conv1d, [(2, 6, 9), (4, 6, 3), (4,)]),
    "conv2d": (torch.conv2d, [(2, 3, 8, 8), (4, 3, 3, 3)]),
}


@pytest.mark.parametrize(("function", "shapes"), PRODUCTS.values(), ids=PRODUCTS.keys())
def test_products_agree_with_torch_forward_and_backward(function, shapes) -> None:
    node = node_of(function, *(meta(*shape) for shape in shapes))
    inputs = [torch.ones(shape, requires_grad=True) for shape in shapes]
    with FlopCounterMode(display=False) as forward:
        out = function(*inputs)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward_flops(node) == forward.get_total_flops() > 0
    assert backward_flops(node) == backward.get_total_flops()


def test_depthwise_convolution_by_hand() -> None:
    node = node_of(lambda x, w: torch.conv1d(x, w, groups=6), meta(2, 6, 9), meta(6, 1, 3))
    assert forward_flops(node) == 2 * (2 * 6 * 7) * 3
    assert backward_flops(node) == 2 * forward_flops(node)


def test_grouped_product_counts_each_row_once() -> None:
    node = node_of(lambda x, w: x @ w[0], meta(6, 8), meta(3, 8, 12))
    node.target = torch.ops.aten._grouped_mm.default
    node.args = tuple(node.graph.find_nodes(op="placeholder"))
    assert forward_flops(node) == 2 * 6 * 8 * 12


def test_linear_by_hand() -> None:
    node = node_of(linear, meta(2, 3, 5), meta(7, 5))
    assert forward_flops(node) == 2 * (2 * 3) * 5 * 7
    assert backward_flops(node) == 2 * forward_flops(node)


@pytest.mark.parametrize(("causal", "share"), [(False, 1), (True, 2)], ids=["full", "causal"])
def test_scaled_dot_product_attention(causal: bool, share: int) -> None:
    def attend(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)

    node = node_of(attend, *(meta(2, 4, 16, 8) for _ in range(3)))
    assert forward_flops(node) == 4 * 2 * 16**2 * (4 * 8) // share
    assert backward_flops(node) == 2 * forward_flops(node)


def test_attention_with_wider_values_and_more_keys() -> None:
    node = node_of(
        scaled_dot_product_attention, meta(2, 4, 3, 8), meta(2, 4, 5, 8), meta(2, 4, 5, 6)
    )
    scores, values = 2 * 2 * 4 * 3 * 5 * 8, 2 * 2 * 4 * 3 * 5 * 6
    assert forward_flops(node) == scores + values


def test_ilm_attention_is_causal_and_free_of_kv_heads() -> None:
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    for node, heads in ((q, 4), (k, 2), (v, 2)):
        node.meta["val"] = meta(2, 16, heads, 8)
    node = graph.call_function(torch.ops.ilm.attention.default, (q, k, v))
    node.meta["val"] = meta(2, 16, 4, 8)
    assert forward_flops(node) == 2 * 2 * 16**2 * (4 * 8)
    assert backward_flops(node) == 2 * forward_flops(node)


@pytest.mark.parametrize("function", [silu, torch.t, torch.sum], ids=["pointwise", "view", "sum"])
def test_other_ops_do_no_flops(function) -> None:
    node = node_of(function, meta(4, 4))
    assert forward_flops(node) == backward_flops(node) == 0


def test_python_functions_do_no_flops() -> None:
    graph = fx.Graph()
    node = graph.call_function(len, (graph.placeholder("x"),))
    assert forward_flops(node) == backward_flops(node) == 0


def test_forward_of_a_llama_matches_the_formula() -> None:
    assert sum(map(forward_flops, llama().nodes)) == GEMM_FLOPS + CAUSAL_FLOPS


def test_model_flops_of_a_llama_are_three_forwards() -> None:
    assert model_flops(llama()) == 3 * (GEMM_FLOPS + CAUSAL_FLOPS)


def test_llama_matrix_products_agree_with_torch() -> None:
    tokens = torch.zeros(BATCH, SEQ, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        Llama()(tokens, tokens).backward()
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 3 * GEMM_FLOPS


def test_only_wanted_gradients_are_counted() -> None:
    node = node_of(linear, meta(2, 3, 5), meta(7, 5))
    x, weight = node.args
    assert backward_flops(node, requires_grad={x}) == forward_flops(node)
    assert backward_flops(node, requires_grad={weight}) == forward_flops(node)
    assert backward_flops(node, requires_grad={x, weight}) == 2 * forward_flops(node)
    assert backward_flops(node, requires_grad=set()) == 0


class Partly(nn.Module):
    """A frozen layer, then a trained one on its output, then a product that is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.trained = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        y = self.trained(self.frozen(x))
        return y, self.frozen(y.detach())


def test_gradients_start_at_trained_parameters_and_end_at_detach() -> None:
    graph = export(Partly(), torch.ones(3, 4))
    linears = [node for node in graph.nodes if node.target == torch.ops.aten.linear.default]
    first, trained, last = linears
    found = gradient_nodes(graph)
    assert [node in found for node in linears] == [False, True, False]
    assert backward_flops(first, requires_grad=found) == 0
    assert backward_flops(trained, requires_grad=found) == forward_flops(trained)
    assert model_flops(graph) == 4 * forward_flops(last)


def test_parameters_are_found_behind_attributes() -> None:
    module = torch.export.export(Partly(), (torch.ones(3, 4),), strict=False).module()
    for node in module.graph.find_nodes(op="get_attr"):
        node.meta["val"] = node.meta["val"].detach()  # the value alone does not say it is trained
    names = {node.target for node in gradient_nodes(module.graph) if node.op == "get_attr"}
    assert names == {"trained.weight"}


@pytest.mark.parametrize(("fraction", "blocks"), [(False, 0), (0.5, 2), (True, 4)])
def test_checkpointed_blocks_run_forward_once_more(fraction: bool | float, blocks: int) -> None:
    """All four blocks do what is left of a forward without the head."""
    program = partition(internlm2_tiny(), tp=2, checkpoint=fraction)
    rows, seq = program.inputs["input_ids"].shape
    vocab, hidden = internlm2_tiny().output.weight.shape
    all_blocks = program.flops // 3 - 2 * rows * seq * vocab * hidden
    assert program.recomputed_flops == blocks * all_blocks // 4
