"""Counts of classes have a size that is known, and a class beyond it does not pass unseen."""

from __future__ import annotations

import pytest
import torch

from ilm_compile import TraceError, trace
from ilm_compile.program.counts import count_classes
from tests.program.execute import Apply, trace_and_compare

CLASSES = torch.tensor([3, 0, 3, 1, 1, 3])
WEIGHTS = {
    "none": None,
    "float32": torch.arange(6.0),
    "float64": torch.arange(6.0, dtype=torch.float64),
    "integers": torch.arange(6),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_counts_are_those_of_bincount(weights):
    found = count_classes(CLASSES, weights, 6)
    torch.testing.assert_close(found, torch.bincount(CLASSES, weights, 6), rtol=0, atol=0)


@pytest.mark.parametrize("beyond", [-1, 4])
def test_a_class_beyond_is_refused(beyond):
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        count_classes(torch.tensor([0, beyond]), None, 4)


def stated(model, x):
    counts = torch.bincount(x.argmax(-1).flatten(), minlength=x.shape[-1])
    classes = counts.shape[0]
    torch._check(classes == x.shape[-1])
    return x * counts.to(x.dtype).var() / classes


CAPTURED = {
    "added to a vector": lambda m, x: (
        x * (x.new_zeros(x.shape[-1]) + x.argmax(-1).flatten().bincount(minlength=x.shape[-1]))
    ),
    "weighted": lambda m, x: (
        x * (torch.ones(x.shape[-1]) + torch.bincount(x.argmax(-1), x[:, 0].detach(), x.shape[-1]))
    ),
    "said how many": stated,
}


@pytest.mark.parametrize("function", CAPTURED.values(), ids=CAPTURED)
def test_counts_of_as_many_classes_as_the_model_says_are_captured(function):
    model = Apply(function)
    program = trace_and_compare(model, model.example_inputs())
    assert program.graph.find_nodes(op="call_function", target=count_classes)


@pytest.mark.parametrize("minlength", [0, 4])
def test_counts_of_who_knows_how_many_classes_are_refused(minlength):
    def counted(model, x):
        return x * torch.bincount(x.argmax(-1), minlength=minlength).to(x.dtype).var()

    with pytest.raises(TraceError, match=r"say of counts how many there are"):
        trace(Apply(counted))
