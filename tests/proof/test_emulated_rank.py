"""What stands for torch.distributed in an emulated rank watches what the runtime does with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ilm_compile.errors import ScheduleError
from ilm_compile.program.lowered import Stage
from ilm_compile.program.plan import Plan
from ilm_compile.proof.emulate import emulate
from ilm_compile.proof.emulated_rank import WatchedSync
from ilm_compile.proof.round_trip import PieceReader
from ilm_compile.proof.threads import AxisGroups, run_groups
from ilm_compile.runtime import executor
from ilm_compile.runtime.checkpoint import CheckpointError, restore
from ilm_compile.runtime.checkpoint.boxes import whole
from ilm_compile.runtime.checkpoint.contents import Piece
from ilm_compile.runtime.checkpoint.manifest import Manifest
from ilm_compile.schedule import build
from tests.runtime.handmade import ROWS, lower_by_hand, make_batch, make_model

PROTOCOLS = {
    "in the last": ("defer back back resume back", None),
    "in the last two": ("defer back resume back back", "resumed 1 times in the step, and weight "),
    "never": ("defer back back back", "resumed 0 times in the step"),
    "after the last": ("defer back back back resume", "weight reduced in 0 of 3 backwards"),
    "twice": ("defer back back resume resume back", "resumed 2 times"),
    "not deferred": ("back back resume back", "weight reduced in 3 of 3"),
}


@pytest.mark.parametrize(("calls", "message"), PROTOCOLS.values(), ids=PROTOCOLS)
def test_gradients_are_to_be_reduced_in_the_last_backward(calls, message):
    module = nn.Linear(2, 2, bias=False)
    sync = WatchedSync(Stage(3, module, (), (), (), (), {}))
    acts = {
        "defer": sync.defer,
        "resume": sync.resume,
        "back": lambda: module(torch.ones(2)).sum().backward(),
    }
    for call in calls.split():
        acts[call]()
    if message is None:
        sync.check()
        return
    with pytest.raises(ScheduleError, match=f"gradient sync of stage 3.*{message}.*expected once"):
        sync.check()


def test_ranks_meet_those_that_are_elsewhere_on_the_given_axes_alone():
    groups = AxisGroups({"tp": 2, "ep": 2, "cp": 2})

    def sums(rank):
        place = torch.tensor(float(rank))
        axes = (["ep", "cp"], ["cp"], ["tp"], [])
        return [groups.communicator(rank, each).all_reduce(place).item() for each in axes]

    found = run_groups(1, groups.sizes, lambda _, rank: sums(rank), meshes=[groups])[0]
    assert found == [  # tp is the slowest: ranks 0 to 3 are all of tp rank 0
        [6, 1, 4, 0], [6, 1, 6, 1], [6, 5, 8, 2], [6, 5, 10, 3],
        [22, 9, 4, 4], [22, 9, 6, 5], [22, 13, 8, 6], [22, 13, 10, 7],
    ]  # fmt: skip


def run(plan, batches, **keywords):
    schedule = build(
        plan.schedule,
        pp=plan.pp,
        num_microbatches=plan.num_microbatches,
        num_chunks=plan.num_chunks,
    )
    return emulate(lower_by_hand(plan), schedule, make_model(), batches, **keywords)


def test_an_executor_that_reduces_too_often_is_refused(monkeypatch):
    compiled = executor.Executor._compile

    def hasty(self, schedule, rank, *, training=True):
        steps = compiled(self, schedule, rank, training=training)
        return sorted(steps, key=lambda step: not step[0].startswith(("defer", "sync")))

    monkeypatch.setattr(executor.Executor, "_compile", hasty)
    with pytest.raises(ScheduleError, match="reduced in 2 of 2 backwards; expected once"):
        run(Plan(num_microbatches=2), [make_batch(2 * ROWS)])


@pytest.mark.parametrize("forgotten", ["restore_model", "restore_optimizer"])
def test_what_a_checkpoint_does_not_bring_back_is_seen_in_the_second_step(monkeypatch, forgotten):
    plan = Plan(tp=2, pp=2, num_microbatches=2)
    batches = [make_batch(2 * ROWS, seed=seed) for seed in range(2)]
    right = run(plan, batches)
    monkeypatch.setattr(restore, forgotten, lambda *arguments, **options: None)
    wrong = run(plan, batches)
    assert all(torch.equal(wrong[0].weights[n], w) for n, w in right[0].weights.items())
    assert not all(torch.equal(wrong[1].weights[n], w) for n, w in right[1].weights.items())


def test_slices_that_overlap_are_refused():
    piece = Piece("model/x", (2,), whole((2,)), torch.zeros(2))
    with pytest.raises(CheckpointError, match="slices that cover shape"):
        PieceReader(Manifest(1, 1, {}, {}, {}, []), [([piece], []), ([piece], [])])


def test_a_model_frozen_as_a_whole_keeps_its_weights():
    plan, model = Plan(num_microbatches=2), make_model().requires_grad_(False)
    lowered = lower_by_hand(plan)
    for variable in lowered.variables.values():
        variable.requires_grad = False
    lowered.stages[0].module.requires_grad_(False)
    batch = make_batch(2 * ROWS)
    steps = emulate(lowered, build("1f1b", pp=1, num_microbatches=2), model, [batch, batch])
    assert steps[1].gradients == {}
    assert all(torch.equal(steps[1].weights[n], p) for n, p in model.named_parameters())
