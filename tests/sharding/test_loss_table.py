"""Ways to write a loss, in any number of micro-batches and data-parallel ranks.

Each is trained as the whole batch in one piece, whose rows have unequal numbers of targets. What is
refused is in `test_loss_terms`.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ilm_compile
from ilm_compile import PlanError
from ilm_compile.partitioning import make_schedule
from ilm_compile.passes import lower
from ilm_compile.program.program import Program
from ilm_compile.proof.emulate import emulate
from ilm_compile.runtime.batch import BatchLayout
from ilm_compile.runtime.mesh import Axis
from tests.sharding.losses import EQUAL, SEQ, WIDTH, batch, check, counted, flat, make, rows_of
from tests.support.world import World

CUTS = [(1, 1), (4, 1), (1, 2), (4, 2)]  # micro-batches, data-parallel ranks


def partition(model: nn.Module, **plan: int) -> Program:
    return ilm_compile.partition(model, example_inputs=rows_of(2), num_microbatches=4, **plan)


def check_cut(model: nn.Module, program: Program, num_microbatches: int, dp: int) -> None:
    whole = batch(2 * num_microbatches * dp)
    schedule = make_schedule(program.plan.replace(num_microbatches=num_microbatches))
    [step] = emulate(lower(program), schedule, model, [whole], dp=dp)
    check(model, whole, step.loss, step.gradients)


@pytest.mark.parametrize("name", EQUAL)
def test_a_loss_is_that_of_the_whole_batch(name: str) -> None:
    model = EQUAL[name]()
    program = partition(model)
    for cut in CUTS:
        model.zero_grad()
        check_cut(model, program, *cut)


@pytest.mark.parametrize("name", ["sum / count", "class weights", "several"])
def test_counts_reach_the_last_stage(name: str) -> None:
    model = EQUAL[name]()
    program = partition(model, pp=2)
    first, _ = lower(program).stages
    assert program.target_counts.keys().isdisjoint(first.batch_inputs)
    check_cut(model, program, 4, 1)


def test_a_count_is_not_rounded() -> None:
    """A number of targets that bfloat16 has not, in a model of that dtype."""

    def loss(s: Tensor, t: Tensor) -> Tensor:
        mask = counted(t).flatten().to(s.dtype)
        return (F.cross_entropy(*flat(s, t), reduction="none") * mask).sum() / mask.sum()

    whole = {"x": torch.zeros(688, SEQ, WIDTH, dtype=torch.bfloat16)}
    whole["labels"] = torch.arange(688)[:, None].expand(-1, SEQ) % 5
    program = ilm_compile.partition(
        make(loss).bfloat16(),
        example_inputs={name: value[:2] for name, value in whole.items()},
        num_microbatches=344,
    )
    (count,) = (node for node in program.graph.nodes if node.target == "batch_total")
    (mean,) = count.users
    assert {count.meta["val"].dtype, mean.meta["val"].dtype} == {torch.float32}
    layout = BatchLayout(program.inputs, 344, Axis())
    assert layout.count(whole, program.target_counts["batch_total"]) == 688 * SEQ


SHORTER = {"x": (2, 3, WIDTH), "labels": (2, 3)}


def test_batches_of_another_shape_are_counted_too() -> None:
    model = EQUAL["distillation"]()
    parallel = ilm_compile.parallelize(
        model, num_microbatches=4, example_inputs=rows_of(2), shapes=[SHORTER]
    )
    for whole in (batch(), {name: value[:, 3:] for name, value in batch().items()}):
        model.zero_grad()
        parallel.zero_grad()
        check(model, whole, parallel.execute_schedule(whole), parallel.full_gradients())


class ByPlace(nn.Module):
    """The mean over the targets at each place of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(*flat(self.head(x), labels), reduction="none")
        return (losses.view_as(labels).sum(0) / counted(labels).sum(0).clamp(min=1)).mean()


def test_a_shape_that_counts_in_another_size_is_refused() -> None:
    model = ByPlace().double()
    parallel = ilm_compile.parallelize(
        model, num_microbatches=4, example_inputs=rows_of(2), shapes=[SHORTER]
    )
    whole = batch()
    check(model, whole, parallel.execute_schedule(whole), parallel.full_gradients())
    with pytest.raises(PlanError, match=r"batch_total.*\(6,\).*batch_total.*\(3,\)"):
        parallel.execute_schedule({name: value[:, 3:] for name, value in whole.items()})


RANKS = ["sum / count", "class weights in a buffer", "class weights by frequency", "several"]


def trained(rank: int) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    result = {}
    own = {key: value[4 * rank :][:4] for key, value in batch().items()}
    for name in RANKS:
        parallel = ilm_compile.parallelize(
            EQUAL[name](), num_microbatches=2, example_inputs=rows_of(2)
        )
        loss = parallel.execute_schedule(own, batch_is_local=True)
        result[name] = loss, parallel.full_gradients()
    return result


def test_ranks_that_hold_their_own_rows_count_together(world2: World) -> None:
    ours, theirs = world2.run(trained)
    for name, (loss, gradients) in ours.items():
        check(EQUAL[name](), batch(), loss, gradients)
        assert loss == theirs[name][0]
