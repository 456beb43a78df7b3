"""Hooks hear of every moment; a stop that one rank asks for; state that goes on where it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.plan import Plan
from ilm_compile.runtime import (
    Beta2Scheduler,
    Hook,
    LossScaler,
    StepMetrics,
    Trainer,
    lr_schedule,
)
from tests.runtime.handmade import ROWS, SEQ, make_batch, make_model, make_parallel
from tests.support.world import World

NAMES = ("on_start", "on_step_start", "on_step_end", "on_exception", "on_stop")


class Diary(Hook):
    """Writes down what it is told. fails_in: the moments in which it raises."""

    def __init__(self, name: str, events: list[str], *, fails_in: tuple[str, ...] = ()) -> None:
        self.name = name
        self.events = events
        self.fails_in = fails_in

    def note(self, moment: str, what: Any = "") -> None:
        self.events.append(f"{self.name} {moment} {what}".rstrip())
        if moment in self.fails_in:
            raise RuntimeError(f"{self.name} fails in {moment}")

    def on_start(self, trainer: Trainer) -> None:
        self.note("on_start", trainer.total_steps)

    def on_step_start(self, trainer: Trainer, step: int) -> None:
        self.note("on_step_start", step)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.note("on_step_end", metrics.step)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        self.note("on_exception", type(error).__name__)

    def on_stop(self, trainer: Trainer) -> None:
        self.note("on_stop")


def make_trainer(**keywords: Any) -> Trainer:
    parallel = make_parallel(Plan(num_microbatches=2), make_model())
    return Trainer(parallel, **{"lr": 1e-2, **keywords})


def batches(first: int, last: int) -> list[dict[str, torch.Tensor]]:
    return [make_batch(2 * ROWS, seed=seed) for seed in range(first, last)]


def fit(trainer: Trainer, num_steps: int) -> list[StepMetrics]:
    first = trainer.num_steps
    return trainer.fit(batches(first, first + num_steps), num_steps, progress=False)


def test_hooks_are_told_in_order_and_stopped_in_reverse() -> None:
    events: list[str] = []
    fit(make_trainer(hooks=[Diary("a", events), Diary("b", events)]), 2)
    moments = [("on_start 2"), *(f"on_step_{e} {n}" for n in (1, 2) for e in ("start", "end"))]
    assert events == [f"{name} {m}" for m in moments for name in "ab"] + ["b on_stop", "a on_stop"]


def test_an_error_is_told_to_all_hooks_and_raised_with_notes_of_further_ones() -> None:
    events: list[str] = []
    hooks = [
        Diary("a", events, fails_in=("on_exception", "on_stop")),
        Diary("b", events, fails_in=("on_step_end",)),
    ]
    with pytest.raises(RuntimeError, match="b fails in on_step_end") as error:
        fit(make_trainer(hooks=hooks), 2)
    assert events[-4:] == [
        "a on_exception RuntimeError",
        "b on_exception RuntimeError",
        "b on_stop",
        "a on_stop",
    ]
    notes = [note for note in error.value.__notes__ if "failed too" in note]
    assert [note.split()[0] for note in notes] == ["Diary.on_exception", "Diary.on_stop"]


def test_a_hook_that_does_not_start_is_not_stopped() -> None:
    events: list[str] = []
    hooks = [Diary("a", events), Diary("b", events, fails_in=("on_start",))]
    with pytest.raises(RuntimeError, match="b fails in on_start"):
        fit(make_trainer(hooks=hooks), 1)
    assert events == ["a on_start 1", "b on_start 1", "a on_exception RuntimeError", "a on_stop"]


def test_an_error_of_on_stop_alone_is_raised() -> None:
    events: list[str] = []
    with pytest.raises(RuntimeError, match="a fails in on_stop"):
        fit(make_trainer(hooks=[Diary("a", events, fails_in=("on_stop",))]), 1)
    assert not any("on_exception" in event for event in events)


class Stopper(Hook):
    """Rank 1 asks to stop while step 2 is under way, from a hook and so in time for step 2."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str | None]] = []

    def on_step_start(self, trainer: Trainer, step: int) -> None:
        if step == 2 and trainer.parallel.mesh.rank == 1:
            trainer.request_stop("enough")

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.seen.append((metrics.step, trainer.stop_reason))


def stop_on_one_rank(rank: int) -> tuple[list[tuple[int, str | None]], int]:
    stopper = Stopper()
    parallel = make_parallel(Plan(tp=2, num_microbatches=2), make_model())
    trainer = Trainer(parallel, hooks=[stopper])
    history = trainer.fit(batches(0, 5), 5, progress=False)
    return stopper.seen, len(history)


def test_a_stop_asked_for_on_one_rank_ends_the_same_step_on_both(world2: World) -> None:
    reasons = ["asked for by rank 1", "enough"]
    for rank, (seen, num_steps) in enumerate(world2.run(stop_on_one_rank)):
        assert num_steps == 2
        assert seen == [(1, None), (2, reasons[rank])]


def test_a_trainer_that_was_stopped_can_go_on() -> None:
    trainer = make_trainer()
    trainer.hooks.append(stopper := Stopper())
    trainer.request_stop("before")
    assert len(fit(trainer, 2)) == 2
    assert [reason for _, reason in stopper.seen] == [None, None]


def resumable() -> Trainer:
    def rate(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return lr_schedule(optimizer, warmup_steps=3, total_steps=12)

    return make_trainer(
        lr_scheduler=rate,
        beta2_scheduler=lambda adam: Beta2Scheduler(adam, init_beta2=0.5, c=0.8),
        scaler=LossScaler(growth_interval=3),
    )


def test_training_goes_on_where_its_state_was_taken() -> None:
    whole = resumable()
    expected = [*fit(whole, 5), *fit(whole, 5)]
    first = resumable()
    fit(first, 5)
    second = resumable()
    second.parallel.load_state_dict(first.parallel.full_state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    # Plain values: JSON is all that they need.
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for metrics, other in zip(fit(second, 5), expected[5:], strict=True):
        assert metrics.loss == pytest.approx(other.loss, rel=1e-12)
        for field in ("step", "lr", "loss_scale", "num_consumed_tokens", "num_skipped_steps"):
            assert getattr(metrics, field) == getattr(other, field), field
    assert second.parallel.num_steps == whole.parallel.num_steps == 10
    betas = [trainer.optimizer.param_groups[0]["betas"] for trainer in (second, whole)]
    assert betas[0] == betas[1]
    assert expected[-1].num_consumed_tokens == 10 * 2 * ROWS * SEQ
    assert {metrics.loss_scale for metrics in expected} == {2.0**16, 2.0**17, 2.0**18, 2.0**19}


def test_the_rate_is_right_without_the_optimizers_state() -> None:
    first = resumable()
    fit(first, 5)
    second = resumable()
    second.load_state_dict(first.state_dict())
    rates = [trainer.optimizer.param_groups[1]["lr"] for trainer in (first, second)]
    assert rates[0] == rates[1]


def test_state_of_other_settings_is_refused_before_anything_changes() -> None:
    trainer = resumable()
    with pytest.raises(IlmCompileError, match="the trainer has lr_scheduler and the state has non"):
        trainer.load_state_dict({**make_trainer().state_dict(), "num_steps": 7})
    assert trainer.num_steps == 0
    state = {**make_trainer().state_dict(), "beta2_scheduler": {"num_steps": 2}}
    with pytest.raises(IlmCompileError, match="the state has beta2_scheduler and the trainer has"):
        make_trainer().load_state_dict(state)


def test_a_loss_scale_of_one_side_starts_anew_or_is_left_out() -> None:
    """As where a run goes on in another dtype."""
    state = fitted(make_trainer(scaler=LossScaler(growth_interval=1)))
    plain, scaled = make_trainer(), make_trainer(scaler=LossScaler(initial_scale=8.0))
    with pytest.warns(UserWarning, match="the loss scale is left out"):
        plain.load_state_dict(state)
    with pytest.warns(UserWarning, match="the loss scale starts anew"):
        scaled.load_state_dict(plain.state_dict())
    assert (plain.num_steps, scaled.num_steps, scaled.loss_scale) == (2, 2, 8.0)


def fitted(trainer: Trainer) -> dict[str, Any]:
    fit(trainer, 2)
    return trainer.state_dict()


def test_a_schedule_goes_on_with_the_rates_and_lengths_that_it_has_now() -> None:
    """Not with the old rate in the new shape: as if it had been so from the start."""

    def scheduled(lr: float, total_steps: int) -> Trainer:
        def rate(optimizer: torch.optim.Optimizer) -> LRScheduler:
            return lr_schedule(optimizer, warmup_steps=1, total_steps=total_steps)

        return make_trainer(lr=lr, lr_scheduler=rate)

    resumed, never_stopped = scheduled(0.02, 20), scheduled(0.02, 20)
    resumed.load_state_dict(fitted(scheduled(0.1, 8)))
    expected = [metrics.lr for metrics in fit(never_stopped, 4)]
    assert [metrics.lr for metrics in fit(resumed, 2)] == expected[2:]


def test_a_schedule_of_torch_that_takes_its_own_rate_along_is_told() -> None:
    def stepwise(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    state = fitted(make_trainer(lr=0.1, lr_scheduler=stepwise))
    with pytest.warns(UserWarning, match=r"saved with, \[0.1, 0.1\]: \[0.02, 0.02\] have no"):
        make_trainer(lr=0.02, lr_scheduler=stepwise).load_state_dict(state)


def test_state_without_a_key_is_refused() -> None:
    state = make_trainer().state_dict()
    del state["num_tokens"]
    with pytest.raises(
        IlmCompileError, match=r"expected .*num_tokens.*, it lacks \['num_tokens'\]"
    ):
        make_trainer().load_state_dict(state)


def test_a_resumed_fit_goes_on_counting(tmp_path: Path) -> None:
    trainer = make_trainer()
    for _ in range(2):
        first = trainer.num_steps
        trainer.fit(batches(first, first + 2), 2, metrics_path=tmp_path / "m", progress=False)
    assert [json.loads(line)["step"] for line in (tmp_path / "m").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]
