"""A constant causal mask becomes a flag; any other mask stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ilm_compile.program.trace import trace

aten = torch.ops.aten
INPUTS = {"x": ((2, 8, 4), torch.float32), "labels": ((2, 8), torch.int64)}


class Attention(nn.Module):
    """One head whose mask is made by `make_mask(length, x)`."""

    def __init__(self, make_mask) -> None:
        super().__init__()
        self.make_mask = make_mask
        self.head = nn.Linear(4, 4)

    def forward(self, x, labels):
        q = self.head(x).unsqueeze(1)
        out = F.scaled_dot_product_attention(q, q, q, attn_mask=self.make_mask(x.shape[1], x))
        return F.cross_entropy(out.flatten(0, 2), labels.flatten())


def causal(length, x):
    places = torch.arange(length, device=x.device)
    return places[None, :] <= places[:, None]


def window(length, x):
    places = torch.arange(length, device=x.device)
    return causal(length, x) & (places[None, :] > places[:, None] - 4)


def of_the_input(length, x):
    return causal(length, x) & (x[:, None, :, :1] > 0)


def attention_of(make_mask, length=8):
    shapes = {"x": ((2, length, 4), torch.float32), "labels": ((2, length), torch.int64)}
    program = trace(Attention(make_mask), example_inputs=shapes)
    (node,) = program.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    return program, node


def test_a_causal_mask_becomes_a_flag_and_its_nodes_go():
    program, node = attention_of(causal)
    assert node.kwargs == {"attn_mask": None, "is_causal": True}
    assert not [n for n in program.calls() if n.target is aten.arange.default]


LONG = 2**17  # 16 GiB as a mask


def strict(length, x):
    places = torch.arange(length, device=x.device)
    return places[None, :] < places[:, None]


def one_too_far(length, x):
    places = torch.arange(length, device=x.device)
    return places[:, None] + 1 >= places[None, :]


def of_one_document(length, x):
    document = torch.zeros(length, device=x.device)
    return causal(length, x) & (document[None, :] == document[:, None])


def of_two_documents(length, x):
    document = torch.arange(length, device=x.device) // (length // 2)
    return causal(length, x) & (document[None, :] == document[:, None])


@pytest.mark.parametrize(
    ("make_mask", "is_flag"),
    [
        (causal, True),
        (of_one_document, True),
        (window, False),
        (strict, False),
        (one_too_far, False),
        (of_two_documents, False),
    ],
)
def test_a_mask_too_long_to_compute_is_known_by_its_rows_and_columns(make_mask, is_flag):
    _, node = attention_of(make_mask, LONG)
    assert node.kwargs.get("is_causal", False) is is_flag


@pytest.mark.parametrize("make_mask", [window, of_the_input])
def test_another_mask_stays(make_mask):
    _, node = attention_of(make_mask)
    assert node.kwargs.get("is_causal", False) is False
    assert len(node.all_input_nodes) == 2


def test_the_loss_stays_the_same():
    torch.manual_seed(0)
    model = Attention(causal).double()
    program = trace(model, example_inputs={**INPUTS, "x": ((2, 8, 4), torch.float64)})
    x, labels = torch.randn(2, 8, 4, dtype=torch.float64), torch.randint(0, 4, (2, 8))
    graph_module = program.graph_module
    graph_module.head = model.head
    targets = torch.tensor(16.0, dtype=torch.float64)
    loss = graph_module(x, labels, targets)[0]
    torch.testing.assert_close(loss, model(x, labels), rtol=1e-12, atol=0)
