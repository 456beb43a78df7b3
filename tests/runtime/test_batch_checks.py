"""Ids outside the vocabulary and batches that differ over the ranks are refused, on every rank."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ilm_compile
from ilm_compile.errors import BatchError
from ilm_compile.ops.lookups import find_lookups
from ilm_compile.program.trace import trace
from ilm_compile.runtime.batch_checks import check_ids
from tests.support.world import World

VOCAB, POSITIONS = 31, 8  # 31 is padded to 32 for two tensor-parallel ranks


class Model(nn.Module):
    """Marks padding by -1, which the forward turns into what may be looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.position = nn.Embedding(POSITIONS, 8)
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.position(position_ids.clamp(min=0))
        logits = self.head(torch.tanh(self.block(x)))[:, :-1]
        targets = labels[:, 1:]
        targets = targets.masked_fill(targets == -1, -100)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_batch(**changes: tuple[int, int, int]) -> dict[str, Tensor]:
    """changes: row, column and value of an input."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (4, 6), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(6).repeat(4, 1)}
    for name, (row, column, value) in changes.items():
        batch[name][row, column] = value
    return batch


def attempt(rank: int, plan: dict[str, Any], batches: list[dict[str, Tensor]]) -> str:
    """What this rank says to its batch; an empty text when it trains on it."""
    torch.manual_seed(0)
    example = {name: tensor[:2] for name, tensor in make_batch().items()}
    parallel = ilm_compile.parallelize(Model().double(), example_inputs=example, **plan)
    try:
        parallel.execute_schedule(batches[rank])
    except BatchError as error:
        return str(error)
    return ""


RIGHT = {
    "the first and the last id": {"input_ids": (3, 1, 0), "labels": (3, 2, VOCAB - 1)},
    "an ignored label": {"labels": (0, 3, -100)},
    "a label that the model ignores": {"labels": (0, 3, -1)},
    "a label that is never looked at": {"labels": (0, 0, 99)},
    "a position that the model clamps": {"position_ids": (1, 1, -5)},
}
WRONG = {
    "an id in the padding": ({"input_ids": (2, 4, VOCAB)}, "input_ids, row 2, column 4;"),
    "an id far away": ({"input_ids": (3, 0, 99)}, "input_ids, row 3, column 0;"),
    "an id below zero": ({"input_ids": (0, 5, -1)}, "input_ids, row 0, column 5;"),
    "a label in the padding": ({"labels": (1, 1, VOCAB)}, "labels, row 1, column 1;"),
    "a position": ({"position_ids": (3, 5, POSITIONS)}, "position_ids, row 3, column 5;"),
}
TP = {"tp": 2, "num_microbatches": 2}


@pytest.mark.parametrize("case", RIGHT)
def test_every_id_that_the_model_takes_is_taken(case: str) -> None:
    traced = trace(Model(), example_inputs={n: t[:2] for n, t in make_batch().items()})
    lookups = tuple(find_lookups(traced))
    check_ids(make_batch(**RIGHT[case]), lookups, num_slices=2)


@pytest.mark.parametrize("case", WRONG)
def test_ids_outside_of_a_sharded_vocabulary_are_refused(world2: World, case: str) -> None:
    changes, place = WRONG[case]
    ((name, (_, _, value)),) = changes.items()
    size = POSITIONS if name == "position_ids" else VOCAB
    said = world2.run(attempt, TP, [make_batch(**changes)] * 2)
    for words in said:
        assert f"expected {name} from 0 to {size - 1}" in words
        assert f"got {value} in {place}" in words
        assert ("or -100 for no target" in words) == (name == "labels")
        assert re.search(r"test_batch_checks\.py:\d+", words)


def test_ids_on_a_device_are_looked_at_if_asked_for() -> None:
    class Elsewhere(Tensor):
        device = torch.device("cuda")

    traced = trace(Model(), example_inputs={n: t[:2] for n, t in make_batch().items()})
    lookups = tuple(find_lookups(traced))
    wrong = make_batch(input_ids=(0, 0, 99))
    batch = {name: tensor.as_subclass(Elsewhere) for name, tensor in wrong.items()}
    check_ids(batch, lookups, num_slices=2)
    with pytest.raises(BatchError, match="got 99 in input_ids, row 0"):
        check_ids(batch, lookups, num_slices=2, on_device=True)


@pytest.mark.parametrize(
    "plan", [{"pp": 2, "num_microbatches": 2}, TP, {"num_microbatches": 1}], ids=["pp", "tp", "dp"]
)
@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_another_batch_on_a_rank_is_refused(world2: World, plan: dict[str, Any], name: str) -> None:
    batch = make_batch()
    other = batch | {name: batch[name].roll(1, 0)}
    said = world2.run(attempt, plan, [batch, other])
    assert said[0] == said[1]
    assert (
        f"the same global batch on every rank, got another {name} on rank 1 than on rank 0"
        in said[0]
    )
    assert world2.run(attempt, plan, [other, other]) == ["", ""]


def late_difference(rank: int, steps: int) -> list[str]:
    from ilm_compile.program.plan import Plan
    from ilm_compile.runtime import Mesh
    from ilm_compile.runtime.batch_checks import SameBatch

    same, said = SameBatch(Mesh.create(Plan(tp=2)), every=3), []
    for step in range(steps):
        values = {"x": torch.tensor([1.0, 2.0, float(rank and step == steps - 1)])}
        try:
            same.check(values)
            said.append("")
        except BatchError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(("steps", "is_seen"), [(3, False), (4, True)])
def test_batches_are_compared_now_and_then(world2: World, steps: int, is_seen: bool) -> None:
    for said in world2.run(late_difference, steps):
        assert [bool(words) for words in said] == [False] * (steps - 1) + [is_seen]
