"""What the monitor notices, whom it tells, and how SIGTERM ends a training."""

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.plan import Plan
from ilm_compile.runtime import LossScaler, Trainer
from ilm_compile.runtime.observe import Monitor
from ilm_compile.runtime.observe.busy import BusyClock
from ilm_compile.runtime.observe.loss_watch import LossWatch
from ilm_compile.runtime.observe.slow_rank import SlowRankWatch
from tests.runtime.handmade import ROWS, make_batch
from tests.runtime.watching import At, Kept, fail, spoil_loss, train
from tests.support.world import World


def test_a_healthy_training_raises_no_alert(tmp_path: Path) -> None:
    kept = Kept()
    train(Monitor(sinks=[kept], folder=tmp_path, slow_every=1, min_free_bytes=1))
    assert kept.alerts == []


def test_alerts_name_job_rank_and_step_and_reach_the_log(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    with caplog.at_level(logging.WARNING, "ilm_compile.monitor"):
        train(At(2, spoil_loss), Monitor(job="7B", sinks=[kept]))
    first, second = kept.alerts
    assert (first.kind, first.job, first.rank, first.step) == ("non-finite", "7B", 0, 2)
    assert "loss nan" in first.message
    assert "1 so far" in first.message
    assert "2 so far" in second.message
    assert caplog.messages[0] == first.text()
    assert first.text().startswith("[7B] non-finite, rank 0, step 2: loss nan")


def overflow(trainer: Trainer) -> None:
    parameters = trainer.parallel.stages[0].module.parameters()
    next(p for p in parameters if p.requires_grad).register_hook(lambda grad: grad + math.inf)


@pytest.mark.parametrize("scaler", [None, LossScaler()], ids=["plain", "scaled"])
def test_an_overflow_is_an_alert_only_without_a_loss_scale(scaler: LossScaler | None) -> None:
    kept = Kept()
    _, history = train(At(2, overflow), Monitor(sinks=[kept]), num_steps=2, scaler=scaler)
    assert history[-1].is_skipped
    assert kept.kinds() == ([] if scaler else ["non-finite"])


def test_a_spike_is_measured_against_the_median_of_the_last_losses() -> None:
    watch = LossWatch(1.5)
    losses = [4.0, 3.0, 2.9, 2.0, 4.3, 2.9, 2.9, 9.0, math.nan, 9.0]
    spikes = [usual for loss in losses if (usual := watch.update(loss)) is not None]
    # 4.0, the start, is no spike; 4.3 is below 1.5 times 2.95; both 9.0 stand out.
    assert spikes == [2.9, 2.95]


def test_few_losses_make_no_spike() -> None:
    watch = LossWatch(1.5)
    assert [watch.update(loss) for loss in (1.0, 9.0, 9.0)] == [None, None, None]


def raise_loss(trainer: Trainer) -> None:
    module = trainer.parallel.stages[-1].module
    module.register_forward_hook(lambda m, a, outputs: (outputs[0] * 10, *outputs[1:]))


def test_a_loss_spike_is_an_alert() -> None:
    kept = Kept()
    _, history = train(At(5, raise_loss), Monitor(sinks=[kept]), num_steps=5)
    assert kept.kinds() == ["loss-spike"]
    assert f"loss {history[-1].loss:.4f}" in kept.alerts[0].message


def test_stuck_is_told_once_until_a_step_ends() -> None:
    kept = Kept()
    slow = At(1, lambda trainer: time.sleep(0.5))
    slow_again = At(3, lambda trainer: time.sleep(0.5))
    train(Monitor(sinks=[kept], stuck_after_s=0.2), slow, slow_again)
    assert kept.kinds() == ["stuck", "stuck"]
    assert kept.alerts[0].message == "no step ended for 0.2 s"


def test_an_exception_is_told_with_the_end_of_its_traceback() -> None:
    kept = Kept()
    with pytest.raises(ValueError, match="on fire"):
        train(Monitor(sinks=[kept]), At(2, fail))
    (alert,) = kept.alerts
    assert (alert.kind, alert.step) == ("exception", 1)
    assert "\nValueError: the disk is on fire" in alert.message
    assert len(alert.message.splitlines()) <= 10


def test_low_disk_is_told_once(tmp_path: Path) -> None:
    kept = Kept()
    train(Monitor(sinks=[kept], folder=tmp_path / "run", min_free_bytes=1 << 60))
    assert kept.kinds() == ["low-disk"]
    assert str(tmp_path / "run") in kept.alerts[0].message


SLEEP_S = 0.05


def slow_down(trainer: Trainer) -> None:
    module = trainer.parallel.stages[0].module
    module.register_forward_pre_hook(lambda module, args: time.sleep(SLEEP_S))


def busy(rank: int, plan: Plan, slow: int) -> float:
    """The seconds that this rank computed in a step in which rank `slow` sleeps in its forwards."""
    trainer, _ = train(plan=plan, num_steps=1)
    if rank == slow:
        slow_down(trainer)
    clock = BusyClock(trainer.parallel)
    clock.start()
    trainer.execute_schedule(
        make_batch(ROWS * plan.num_microbatches * trainer.parallel.mesh.dp.size)
    )
    return clock.stop()


@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize(
    "plan",
    [Plan(tp=2, num_microbatches=2), Plan(num_microbatches=4, zero=1), Plan(pp=2)],
    ids=["tp2", "dp2", "pp2"],
)
def test_a_slow_rank_computes_longer_than_those_that_wait_for_it(
    world2: World, plan: Plan, slow: int
) -> None:
    times = world2.run(busy, plan, slow)
    assert times[slow] > times[1 - slow] + 0.5 * SLEEP_S * plan.num_microbatches


def find_slow_rank(rank: int) -> list[str]:
    kept = Kept()
    plant = At(1, slow_down if rank == 1 else lambda trainer: None)
    monitor = Monitor(sinks=[kept], slow_every=2)
    train(plant, monitor, plan=Plan(tp=2, num_microbatches=2), num_steps=3)
    return [f"{alert.kind} {alert.step} {alert.message}" for alert in kept.alerts]


def test_a_slow_rank_is_told_in_every_nth_step_by_rank_0(world2: World) -> None:
    (message,), others = world2.run(find_slow_rank)
    assert message.startswith("slow-rank 2 rank 1 computed for 0.1")
    assert others == []


MESH = SimpleNamespace(world_size=6, fsdp=SimpleNamespace(size=2), tp=SimpleNamespace(size=1))


def test_a_rank_is_compared_with_those_of_its_stage() -> None:
    watch = SlowRankWatch(1.5, MESH)
    assert watch.update([1.0, 1.2, 3.0, 3.0, 5.0, 8.0]) == [(5, pytest.approx(1.6))]


def test_a_stage_of_one_rank_is_compared_with_its_own_past() -> None:
    mesh = SimpleNamespace(world_size=2, fsdp=SimpleNamespace(size=1), tp=SimpleNamespace(size=1))
    watch = SlowRankWatch(1.5, mesh)
    seen = [watch.update([1.0, time]) for time in (3.0, 5.0, 4.0, 6.5)]
    assert seen == [[], [], [], [(1, pytest.approx(6.5 / 4))]]


def fail_on_all_ranks(rank: int, folder: Path) -> list[str]:
    kept = Kept()
    with pytest.raises(ValueError, match="on fire"):
        train(Monitor(sinks=[kept], folder=folder), At(2, fail), plan=Plan(pp=2))
    return kept.kinds()


def test_of_an_error_on_all_ranks_one_is_told(world2: World, tmp_path: Path) -> None:
    for _ in range(2):  # the next run is told of again
        assert sorted(world2.run(fail_on_all_ranks, tmp_path)) == [[], ["exception"]]


def terminate_rank_1(rank: int) -> tuple[int, str | None, list[str], bool]:
    kept = Kept()
    before = signal.getsignal(signal.SIGTERM)
    kill = At(2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else None)
    trainer, history = train(Monitor(sinks=[kept]), kill, plan=Plan(pp=2), num_steps=9)
    is_restored = signal.getsignal(signal.SIGTERM) == before
    messages = [alert.message for alert in kept.alerts]
    return len(history), trainer.stop_reason, messages, is_restored


def test_sigterm_to_one_rank_ends_the_training_of_all(world2: World) -> None:
    first, second = world2.run(terminate_rank_1)
    assert first == (2, "asked for by rank 1", ["stopping: asked for by rank 1"], True)
    assert second == (2, "SIGTERM", [], True)


PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from ilm_compile.runtime import Hook
from ilm_compile.runtime.observe import Command, Monitor
from tests.runtime.watching import train

class Saving(Hook):
    def on_step_end(self, trainer, metrics):
        if metrics.step == 1:
            print("ready", flush=True)
        time.sleep(0.02)
        if trainer.stop_reason is not None:
            print("saved", metrics.step, trainer.stop_reason, flush=True)

code = "import sys; open({file!r}, 'w').write(sys.argv[1])"
command = Command([{python!r}, "-c", code])
train(Monitor(sinks=[command]), Saving(), num_steps=1000)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_a_program_with_status_0_once_it_has_saved(name: str, tmp_path: Path) -> None:
    root, file = Path(__file__).parents[2], tmp_path / "alert"
    source = PROGRAM.format(root=str(root), python=sys.executable, file=str(file))
    program = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    program.send_signal(signal.Signals[name])
    rest, _ = program.communicate(timeout=30)
    assert program.returncode == 0
    assert rest.startswith("saved ")
    assert rest.endswith(f" {name}\n")
    assert f"stopping: {name}" in file.read_text()


def signal_twice(number: signal.Signals) -> int:
    """Steps taken by a training that is sent a signal after its second step, twice."""

    def kill(trainer: Trainer) -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    return len(train(Monitor(), At(2, kill), num_steps=9)[1])


def test_a_second_sigterm_changes_nothing() -> None:
    assert signal_twice(signal.SIGTERM) == 2


def test_a_second_ctrl_c_ends_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has none
    try:
        with pytest.raises(KeyboardInterrupt):
            signal_twice(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


LATE = """
import os, signal
from ilm_compile.runtime.guard.activity import ACTIVITY
from ilm_compile.runtime.guard.stop_signals import heed_no_second_signal
heed_no_second_signal()
ACTIVITY.stopping = {stopping!r}
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(("stopping", "code"), [("SIGTERM", 0), ("", -signal.SIGTERM)])
def test_a_signal_after_the_save_does_not_kill_and_one_before_the_training_does(
    stopping: str, code: int
) -> None:
    source = LATE.format(stopping=stopping)
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == code


def test_a_stop_that_takes_longer_than_the_grace_time_is_told() -> None:
    kept = Kept()

    def kill_and_sleep(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.4)

    train(Monitor(sinks=[kept], grace_s=0.2), At(2, kill_and_sleep))
    assert kept.kinds() == ["late", "stop"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Monitor(stuck_after_s=0), "stuck_after_s must be above 0, got 0"),
        (lambda: Monitor(spike_ratio=1.0), "spike_ratio must be above 1, got 1.0"),
        (lambda: Monitor(slow_ratio=0.5), "slow_ratio must be above 1, got 0.5"),
        (lambda: Monitor(slow_every=0), "slow_every must be above 0, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(IlmCompileError, match=message):
        make()
