"""Micro-batches of one row: what their loss does with rows is told by a trace of a few blocks."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ilm_compile
from tests.sharding.losses import CLASSES, WIDTH, mean, rows_of

BLOCKS = 6
RUNS: list[int] = []  # the blocks that ran: what hangs on a model, tracing puts back


class Block(nn.Module):
    """Keeps rows apart, but for the one that is told to mix them, where there are several."""

    def __init__(self, place: int, mixing: int | None) -> None:
        super().__init__()
        self.place, self.is_mixing = place, place == mixing
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        RUNS.append(self.place)
        if self.is_mixing and len(x) > 1:
            x = x - x.mean(0)
        return x + self.linear(x.reshape(-1, WIDTH)).view_as(x)


class Model(nn.Module):
    """A row of blocks and a plain mean cross entropy."""

    def __init__(self, mixing: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(i, mixing) for i in range(BLOCKS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return mean(self.head(x), labels)


def partition(model: nn.Module) -> list[str]:
    """What is said of the loss in micro-batches of one row."""
    program = ilm_compile.partition(model, example_inputs=rows_of(1), num_microbatches=2)
    return [warning for warning in program.warnings if warning.startswith("loss:")]


def test_blocks_that_are_alike_are_traced_once_more_as_the_first_of_them():
    model = Model()
    blocks = list(model.layers)
    RUNS.clear()
    assert partition(model) == []
    assert [*range(BLOCKS), 0, 1] == RUNS
    assert list(model.layers) == blocks


@pytest.mark.parametrize("mixing", range(1, BLOCKS))
def test_a_block_that_mixes_rows_where_there_are_several_is_told(mixing: int):
    (warning,) = partition(Model(mixing))
    assert f"(layers.{mixing}, " in warning


class Weighed(nn.Module):
    """Scores times the number of their row, and no call in which a row of size 1 is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        factors = torch.arange(1, len(x) + 1, device=x.device)[:, None, None]
        return F.cross_entropy((self.head(x) * factors).transpose(1, 2), labels)


def test_a_factor_by_the_number_of_a_row_is_told():
    assert "may mix the rows" in "".join(partition(Weighed()))
