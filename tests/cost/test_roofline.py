"""Bytes and time of single nodes, worked out by hand."""

from dataclasses import replace

import pytest
import torch
from torch import fx
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

from ilm_compile.cost import HARDWARE, Hardware, node_bytes, node_time
from ilm_compile.cost.constants import Efficiency
from ilm_compile.cost.layer_time import ATTENTION_BACKWARD
from ilm_compile.errors import PlanError
from tests.cost.graphs import llama, meta, node_of

# 100 TFLOP/s and 1 TB/s at efficiency 0.5: half of each is usable
MACHINE = replace(
    HARDWARE["h100"],
    name="machine",
    peak_flops={torch.float32: 1e14},
    memory_bandwidth=1e12,
    efficiency=Efficiency(matmul=0.5, attention=0.25),
    memory_efficiency=0.5,
    kernel_overhead_s=1e-6,
)

BYTES = {
    "pointwise": (silu, [meta(3, 5)], 2 * 15 * 4),
    "add reads two": (torch.add, [meta(3, 5), meta(5)], (15 + 5 + 15) * 4),
    "same input once": (lambda x: x * x, [meta(3, 5)], 2 * 15 * 4),
    "linear": (linear, [meta(3, 5), meta(7, 5)], (15 + 35 + 21) * 4),
    "cast": (lambda x: x.to(torch.bfloat16), [meta(3, 5)], 15 * 4 + 15 * 2),
    "embedding reads rows": (
        lambda ids, table: embedding(ids, table),
        [meta(3, dtype=torch.long), meta(1000, 8)],
        3 * 8 + 2 * 3 * 8 * 4,
    ),
    "small table whole": (
        lambda ids, table: embedding(ids, table),
        [meta(300, dtype=torch.long), meta(2, 8)],
        300 * 8 + 2 * 8 * 4 + 300 * 8 * 4,
    ),
    "transpose": (lambda x: x.t(), [meta(3, 5)], 0),
    "slice": (lambda x: x[1:], [meta(3, 5)], 0),
    "reshape": (lambda x: x.reshape(5, 3), [meta(3, 5)], 0),
    "reshape of strided copies": (lambda x: x.reshape(15), [meta(5, 3).t()], 2 * 15 * 4),
    "in place writes": (lambda x: x.clone().add_(1), [meta(3, 5)], 2 * 15 * 4),
    "getitem": (lambda x: x.chunk(2)[0], [meta(4, 5)], 0),
}


@pytest.mark.parametrize(("function", "inputs", "expected"), BYTES.values(), ids=BYTES.keys())
def test_node_bytes(function, inputs, expected: int) -> None:
    assert node_bytes(node_of(function, *inputs)) == expected


def test_dtype_changes_floating_point_only() -> None:
    node = node_of(lambda ids, table: embedding(ids, table), meta(3, dtype=torch.long), meta(9, 8))
    assert node_bytes(node, dtype=torch.bfloat16) == 3 * 8 + 2 * 3 * 8 * 2


def test_large_product_is_bound_by_compute() -> None:
    node = node_of(torch.mm, meta(4096, 4096), meta(4096, 4096))
    assert node_time(node, MACHINE) == pytest.approx(2 * 4096**3 / 0.5e14 + 1e-6, rel=1e-12)


def test_pointwise_is_bound_by_memory() -> None:
    node = node_of(silu, meta(4096, 4096))
    assert node_time(node, MACHINE) == pytest.approx(2 * 4096**2 * 4 / 0.5e12 + 1e-6, rel=1e-12)


def test_shards_divide_work_but_not_overhead() -> None:
    node = node_of(torch.mm, meta(4096, 4096), meta(4096, 4096))
    whole, half = node_time(node, MACHINE), node_time(node, MACHINE, shards=2)
    assert half - 1e-6 == pytest.approx((whole - 1e-6) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [(torch.mm, [meta(4096, 4096)] * 2), (silu, [meta(4096, 4096)])],
    ids=["compute", "memory"],
)
def test_backward_is_twice_the_work(function, inputs) -> None:
    node = node_of(function, *inputs)
    forward, backward = node_time(node, MACHINE), node_time(node, MACHINE, backward=True)
    assert backward - 1e-6 == pytest.approx(2 * (forward - 1e-6), rel=1e-12)


def test_16_bits_are_faster() -> None:
    node, h100 = node_of(torch.mm, meta(4096, 4096), meta(4096, 4096)), HARDWARE["h100"]
    assert node_time(node, h100, dtype=torch.bfloat16) < node_time(node, h100) / 4


@pytest.mark.parametrize("op", ["placeholder", "output"])
def test_what_is_no_call_takes_no_time(op: str) -> None:
    assert {node_time(node, MACHINE) for node in llama().nodes if node.op == op} == {0.0}


def test_python_functions_and_views_take_no_time() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = meta(3, 5)
    function = graph.call_function(len, (x,))
    function.meta["val"] = meta(3, 5)
    assert node_time(function, MACHINE) == 0
    assert node_time(node_of(torch.t, meta(3, 5)), MACHINE) == 0


@pytest.mark.parametrize("hardware", HARDWARE.values(), ids=HARDWARE.keys())
def test_time_grows_with_size_and_falls_with_shards(hardware: Hardware) -> None:
    nodes = [node_of(torch.mm, meta(n, 256), meta(256, 256)) for n in (1, 64, 1024, 8192)]
    times = [node_time(node, hardware) for node in nodes]
    assert times == sorted(times)
    assert times[0] > hardware.kernel_overhead_s
    shares = [node_time(nodes[-1], hardware, shards=n) for n in (8, 4, 2, 1)]
    assert shares == sorted(shares)


def test_unknown_dtype_is_refused() -> None:
    node = node_of(torch.mm, meta(4, 4), meta(4, 4))
    with pytest.raises(PlanError, match=r"machine for torch.float64; known: torch.float32"):
        node_time(node, MACHINE, dtype=torch.float64)


def test_a_product_takes_its_operands_beside_its_arithmetic() -> None:
    node = node_of(linear, meta(1000, 2000), meta(3000, 2000))
    slow = replace(MACHINE, efficiency=Efficiency(matmul=0.5, attention=0.25, operands=0.2))
    num_bytes = 4 * (1000 * 2000 + 3000 * 2000 + 1000 * 3000)
    for backward, products in ((False, 1), (True, 2)):
        more = node_time(node, slow, backward=backward) - node_time(
            node, MACHINE, backward=backward
        )
        assert more == pytest.approx(products * num_bytes / 1e11)


@pytest.mark.parametrize(("backward", "times"), [(False, 1), (True, ATTENTION_BACKWARD)])
def test_attention_has_a_rate_of_its_own(backward: bool, times: float) -> None:
    reached = replace(MACHINE, memory_bandwidth=1e30, kernel_overhead_s=0)
    q = meta(2, 8, 64, 32)
    node = node_of(scaled_dot_product_attention, q, q, q)
    expected = times * 4 * 16 * 64 * 64 * 32 / 0.25e14
    assert node_time(node, reached, backward=backward) == pytest.approx(expected)
