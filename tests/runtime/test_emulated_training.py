"""The runtime alone, all ranks emulated: a hand-made program trains as plain PyTorch does."""

import pytest
import torch
from torch import Tensor, nn

from ilm_compile.program.plan import Plan
from ilm_compile.proof.emulate import Step, emulate
from ilm_compile.proof.emulated_rank import EPSILON, LEARNING_RATE
from ilm_compile.schedule import Action, Schedule, build, check, insert_comms
from tests.runtime.handmade import ROWS, lower_by_hand, make_batch, make_model

MAX_NORM = 0.03
CHUNKS = {"num_chunks": 2, "schedule": "interleaved_1f1b"}
CASES = {
    "one": (Plan(num_microbatches=2), 1, False),
    "dp": (Plan(num_microbatches=2), 2, False),
    "tp": (Plan(tp=2, num_microbatches=2), 1, True),
    "pp": (Plan(pp=2, num_microbatches=3), 1, True),
    "chunks": (Plan(pp=2, num_microbatches=2, **CHUNKS), 2, True),  # type: ignore[arg-type]
    "tp-pp": (Plan(tp=2, pp=2, num_microbatches=2), 2, False),
}


def train(
    tied: bool, batches: list[dict[str, Tensor]], max_norm: float = MAX_NORM
) -> tuple[list[float], list[Step]]:
    """The same steps in plain PyTorch, and the norms of their gradients."""
    model = make_model(tied=tied)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPSILON)
    norms, steps = [], []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        named = dict(model.named_parameters())
        gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
        weights = {name: p.detach().clone() for name, p in named.items()}
        steps.append(Step(loss.detach(), gradients, weights))
    return norms, steps


# Stages that follow each other on one rank hand over in memory, and both ends of a tied weight.
ADJACENT = {
    "two": ("0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1", "2F0 3F0 3B0 2B0 2F1 3F1 3B1 2B1"),
    "one": ("0F0 1F0 2F0 3F0 0F1 1F1 2F1 3F1 3B1 2B1 1B1 0B1 3B0 2B0 1B0 0B0",),
}


def schedule_of(plan: Plan) -> Schedule:
    return build(
        plan.schedule,
        pp=plan.pp,
        num_microbatches=plan.num_microbatches,
        num_chunks=plan.num_chunks,
    )


@pytest.mark.parametrize("rows", ADJACENT.values(), ids=ADJACENT)
def test_adjacent_stages_on_one_rank_hand_over(rows: tuple[str, ...]) -> None:
    plan = Plan(pp=2, num_microbatches=2, **CHUNKS)  # type: ignore[arg-type]
    actions = [[Action.parse(text) for text in row.split()] for row in rows]
    schedule = insert_comms(Schedule.from_rows("adjacent", actions))
    check(schedule)
    check_steps("adjacent", plan, schedule, dp=1, tied=True)


def test_steps_equal_those_of_plain_pytorch_under_every_plan() -> None:
    for name, (plan, dp, tied) in CASES.items():
        check_steps(name, plan, schedule_of(plan), dp=dp, tied=tied)


@pytest.mark.parametrize("max_norm", [100.0, None])
def test_small_gradients_are_not_scaled(max_norm: float | None) -> None:
    plan = Plan(tp=2, num_microbatches=2)
    batch = make_batch(ROWS * 2)
    _, [expected] = train(False, [batch], 100.0)
    lowered, model = lower_by_hand(plan), make_model()
    [step] = emulate(lowered, schedule_of(plan), model, [batch], max_norm=max_norm)
    same(step.weights, expected.weights, 1e-8)


def check_steps(name: str, plan: Plan, schedule: Schedule, *, dp: int, tied: bool) -> None:
    rows = ROWS * plan.num_microbatches * dp
    batches = [make_batch(rows, seed=seed) for seed in range(3)]
    norms, expected = train(tied, batches)
    assert min(norms) > MAX_NORM, "nothing would be clipped"
    steps = emulate(
        lower_by_hand(plan, tied=tied),
        schedule,
        make_model(tied=tied),
        batches,
        dp=dp,
        max_norm=MAX_NORM,
    )
    for step, wanted in zip(steps, expected, strict=True):
        torch.testing.assert_close(step.loss, wanted.loss, rtol=1e-10, atol=0, msg=name)
        same(step.gradients, wanted.gradients, 1e-9)
        same(step.weights, wanted.weights, 1e-8)


def same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=bound, atol=1e-12, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_evaluated_outputs_are_those_of_the_weights_before_the_step(tied: bool) -> None:
    plan = Plan(tp=2, pp=2, num_microbatches=2)
    batch = make_batch(ROWS * 2 * 2)
    [step] = emulate(
        lower_by_hand(plan, tied=tied),
        build("1f1b", pp=2, num_microbatches=2),
        make_model(tied=tied),
        [batch],
        dp=2,
        keep_outputs=True,
    )
    logits = make_model(tied=tied).logits(batch["input_ids"])
    torch.testing.assert_close(step.outputs["logits"], logits, rtol=1e-10, atol=1e-12)
    relayed = batch["input_ids"].double()
    assert torch.equal(step.outputs["relayed"], relayed)
