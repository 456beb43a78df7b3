"""The emulation of all ranks in one process is the real thing, and refuses what cannot run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ilm_compile.errors import PlacementError, ProgramError, ScheduleError
from ilm_compile.partitioning import make_schedule
from ilm_compile.passes import lower
from ilm_compile.proof.compare import compare
from ilm_compile.proof.emulate import emulate
from ilm_compile.proof.reference import single_device_step
from tests.proof.real import compare_with_emulation
from tests.proof.small import compile_model, make_batch, make_model
from tests.support.equality import Case

BOUND = 1e-12
CASES = {
    2: [
        Case("internlm2", {"tp": 2, "sequence_parallel": True, "num_microbatches": 2}),
        Case("internlm", {"pp": 2, "num_chunks": 2, "num_microbatches": 4, "checkpoint": 0.5}),
        Case("hf-gpt2", {"pp": 2, "schedule": "gpipe", "num_microbatches": 3}),
    ],
    4: [
        Case("internlm2", {"tp": 2, "pp": 2, "num_chunks": 2, "num_microbatches": 4}),
        Case("hf-gpt2", {"tp": 2, "pp": 2, "sequence_parallel": True}),
        Case("skip", {"pp": 2, "num_microbatches": 3}, dp=2),
    ],
}


@pytest.mark.parametrize("case", CASES[2], ids=str)
def test_equals_two_real_processes(case, world2):
    check(case, world2)


@pytest.mark.parametrize("case", CASES[4], ids=str)
def test_equals_four_real_processes(case, world4):
    check(case, world4)


def check(case, world):
    [(_, errors)] = world.run(compare_with_emulation, [case])[0]
    assert errors.loss <= BOUND, errors
    assert errors.gradient <= BOUND, errors


def setup(name, **plan):
    model = make_model(name)
    program = compile_model(model, **plan)
    return model, program, make_schedule(program.plan), make_batch(program)


def test_weights_after_a_step_equal_the_plain_model_s():
    model, program, schedule, batch = setup("internlm2", tp=2, pp=2, num_microbatches=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = compare(
        emulate(lower(program), schedule, model, [batch])[0], single_device_step(model, batch)
    )
    assert found.is_equal(1e-10)
    assert found.weights.keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_emulation_gives_the_same_bits_each_time():
    model, program, schedule, batch = setup("hf-gpt2", tp=2, pp=2, num_microbatches=3)
    first, second = (emulate(lower(program), schedule, model, [batch])[0] for _ in range(2))
    assert all(torch.equal(first.gradients[n], g) for n, g in second.gradients.items())


def with_row(schedule, rank, row):
    rows = list(schedule.actions)
    rows[rank] = tuple(row)
    return replace(schedule, actions=tuple(rows))


def test_a_message_that_is_never_sent_is_refused_at_once():
    model, program, schedule, batch = setup("internlm2", pp=2)
    row = [action for action in schedule.actions[0] if str(action) != "0SEND_F1"]
    with pytest.raises(ScheduleError, match="rank 1 waits for message 1 of rank 0, which was"):
        emulate(lower(program), with_row(schedule, 0, row), model, [batch])


def test_a_message_without_the_value_that_it_should_carry_is_refused():
    model, program, schedule, batch = setup("internlm2", pp=2)
    last = schedule.actions[1][-1]
    twice = with_row(schedule, 1, (*schedule.actions[1], last))
    with pytest.raises(ScheduleError, match=r"expected a message of .*, got \[\]"):
        emulate(lower(program), twice, model, [batch])


def test_a_gradient_that_differs_between_ranks_is_refused():
    model, program, schedule, batch = setup("internlm2", tp=2, sequence_parallel=True)
    norm = next(n for n in program.calls() if n.name == "rms_norm")
    norm.replace_input_with(norm.args[2], norm.args[2].args[0])
    with pytest.raises(PlacementError, match=r"layers\.0\.attention_norm\.weight is invariant"):
        emulate(lower(program), schedule, model, [batch])


def test_a_copy_of_a_tied_weight_that_is_not_trained_is_refused():
    model, program, schedule, batch = setup("hf-gpt2", pp=2)
    lowered = lower(program)
    last = lowered.stages[-1]
    last.module.get_parameter(last.variables["transformer.wte.weight"]).requires_grad_(False)
    with pytest.raises(ProgramError, match=r"wte\.weight is held by 2 stages, and copy 2 gets no"):
        emulate(lowered, schedule, model, [batch])
