"""What a program warns of is said at launch, by the line that asks for it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ilm_compile
from ilm_compile.partitioning import MOST_TOLD

EXAMPLE = {name: ((2, 4), torch.int64) for name in ("input_ids", "labels")}


class WithIdle(nn.Module):
    """A small model, and layers that take no part in its loss."""

    def __init__(self, num_idle: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.idle = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(num_idle))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.embed(input_ids).flatten(0, 1), labels.flatten())


def told(num_idle: int) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ilm_compile.parallelize(WithIdle(num_idle), example_inputs=EXAMPLE)
    return [w for w in found if w.filename == __file__]


@pytest.mark.parametrize("num_idle", [0, 1, MOST_TOLD])
def test_a_launch_says_what_the_program_warns_of(num_idle):
    program = ilm_compile.partition(WithIdle(num_idle), example_inputs=EXAMPLE)
    found = [str(w.message) for w in told(num_idle)]
    assert found == program.warnings
    assert len(found) == num_idle
    assert all("takes no part in the loss" in sentence for sentence in found)


def test_of_many_the_first_are_said_and_where_the_others_are():
    *first, last = (str(w.message) for w in told(MOST_TOLD + 4))
    assert len(first) == MOST_TOLD
    assert last == "and 4 more, which `partition(...).explain()` lists"
