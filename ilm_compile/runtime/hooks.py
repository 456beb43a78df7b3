"""Hooks: what logger, monitor, profiler, checkpoints and evaluation have in common.

`Trainer.fit` tells every hook of the same few moments, on every rank and in the order in which the
hooks were given, so a hook may use collectives as long as it does so on all ranks alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ilm_compile.runtime.metrics import StepMetrics
    from ilm_compile.runtime.trainer import Trainer


class Hook:
    """Does nothing at each moment; override those that matter.

    An error raised in `on_start`, `on_step_start` or `on_step_end` ends the training. One raised
    where an error is being handled already is added to that error as a note.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of a `fit`; ``trainer.num_steps`` were done, resumed ones included.

        ``trainer.total_steps`` is the number of the last one that this `fit` shall take.
        """

    def on_step_start(self, trainer: Trainer, step: int) -> None:
        """Before step number `step`, counted from 1 over the whole training."""

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """After a step, its time not counting into the step's.

        ``trainer.stop_reason`` is the same on every rank here; where it is set, this was the last
        step of the `fit`. A hook may still call ``trainer.request_stop``: the next step is then
        the last.
        """

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """When the `fit` ends with `error`, on the ranks that have one. No collectives here."""

    def on_stop(self, trainer: Trainer) -> None:
        """At the end of a `fit`, however it ended, last hook first. No collectives after errors.

        Not called on a hook whose `on_start` failed or was not reached.
        """


class Hooks:
    """Tells a list of hooks of each moment."""

    def __init__(self, hooks: list[Hook]) -> None:
        self._hooks = hooks
        self._started: list[Hook] = []

    def start(self, trainer: Trainer) -> None:
        for hook in self._hooks:
            hook.on_start(trainer)
            self._started.append(hook)

    def step_start(self, trainer: Trainer, step: int) -> None:
        for hook in self._hooks:
            hook.on_step_start(trainer, step)

    def step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        for hook in self._hooks:
            hook.on_step_end(trainer, metrics)

    def exception(self, trainer: Trainer, error: BaseException) -> None:
        for hook in self._started:
            try:
                hook.on_exception(trainer, error)
            except Exception as second:
                error.add_note(f"{type(hook).__name__}.on_exception failed too: {second!r}")

    def stop(self, trainer: Trainer, error: BaseException | None) -> None:
        """Every hook that was started gets its `on_stop`; the first error of one comes last."""
        first = error
        for hook in reversed(self._started):
            try:
                hook.on_stop(trainer)
            except Exception as second:
                if first is None:
                    first = second
                else:
                    first.add_note(f"{type(hook).__name__}.on_stop failed too: {second!r}")
        self._started = []
        if error is None and first is not None:
            raise first
