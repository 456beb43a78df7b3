"""The bytes each rank sends in each collective, by the ring algorithms."""

from typing import Any

import pytest
import torch
from torch import fx

from ilm_compile.program.collectives import redistribute
from ilm_compile.program.placement import Placement
from ilm_compile.program.traffic import Message, traffic
from ilm_compile.program.vocab import vocab_cross_entropy

SHAPE = (8, 16)
TP4 = {"tp": 4}
FULL = 8 * 16 * 4  # bytes of the full float32 tensor


def moved(src: str, dst: str, size: int) -> fx.Node:
    graph = fx.Graph()
    value = graph.placeholder("x")
    value.meta["val"] = torch.empty(Placement.parse(src).local_shape(SHAPE, size), device="meta")
    node = graph.call_function(redistribute, (value,), {"src": src, "dst": dst, "axis": "tp"})
    node.meta["val"] = torch.empty(Placement.parse(dst).local_shape(SHAPE, size), device="meta")
    return node


BY_HAND: dict[tuple[str, str], tuple[tuple[str, float] | None, tuple[str, float] | None]] = {
    # (from, to): what is sent over four ranks as a share of the full tensor, forward and backward
    ("P", "I"): (("all_reduce", 6 / 4), None),
    ("P", "R"): (("all_reduce", 6 / 4), ("all_reduce", 6 / 4)),
    ("I", "R"): (None, ("all_reduce", 6 / 4)),
    ("P", "S(0)"): (("reduce_scatter", 3 / 4), ("all_gather", 3 / 4)),
    ("S(0)", "R"): (("all_gather", 3 / 4), ("reduce_scatter", 3 / 4)),
    ("S(1)", "I"): (("all_gather", 3 / 4), None),
    ("I", "S(1)"): (None, ("all_gather", 3 / 4)),
    ("R", "S(0)"): (None, None),
    ("S(0)", "S(1)"): (("all_to_all", 3 / 16), ("all_to_all", 3 / 16)),
    ("S(1)", "S(1, segments=(8, 8))"): (("all_gather", 3 / 4), ("all_gather", 3 / 4)),
    ("I", "P"): (None, None),
    ("R", "P"): (None, None),
    ("R", "I"): (None, None),
}


@pytest.mark.parametrize(
    ("pair", "expected"), BY_HAND.items(), ids=lambda v: " to ".join(map(str, v))
)
def test_redistribute(pair: tuple[str, str], expected: Any) -> None:
    directions = [
        Message(sent[0], FULL * sent[1], backward)
        for sent, backward in zip(expected, (False, True), strict=True)
        if sent is not None
    ]
    assert traffic(moved(*pair, 4), TP4) == directions


def test_without_gradient_nothing_runs_backward() -> None:
    assert traffic(moved("P", "R", 4), TP4, has_gradient=False) == [
        Message("all_reduce", FULL * 6 / 4, False)
    ]
    assert traffic(moved("I", "R", 4), TP4, has_gradient=False) == []


@pytest.mark.parametrize(
    ("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)], ids=str
)
@pytest.mark.parametrize(("smoothing", "stacked"), [(0.0, 2), (0.1, 3)])
def test_cross_entropy_reduces_numbers_per_token(
    smoothing: float, stacked: int, dtype: torch.dtype, itemsize: int
) -> None:
    graph = fx.Graph()
    logits, target = graph.placeholder("logits"), graph.placeholder("target")
    logits.meta["val"] = torch.empty(10, 25, device="meta", dtype=dtype)
    node = graph.call_function(vocab_cross_entropy, (logits, target, 1, -100, smoothing, "tp"))
    row = 10 * itemsize * 6 / 4
    assert traffic(node, TP4) == [
        Message("all_reduce", row, False),
        Message("all_reduce", stacked * row, False),
    ]


def test_other_calls_send_nothing() -> None:
    graph = fx.Graph()
    assert (
        traffic(graph.call_function(torch.ops.aten.exp.default, (graph.placeholder("x"),)), TP4)
        == []
    )
