"""Windows of torch.profiler as Chrome traces, with every action of the schedule by name."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from ilm_compile.errors import IlmCompileError
from ilm_compile.files import whole_file
from ilm_compile.runtime.hooks import Hook
from ilm_compile.runtime.metrics import StepMetrics
from ilm_compile.runtime.trainer import Trainer


class Profiler(Hook):
    """Records `num_steps` steps from step `first_step` on, and again every `every` steps if given.

    Each window becomes ``trace-steps-A-B-rank-R.json`` in `folder`, for chrome://tracing or
    ui.perfetto.dev. Forwards, backwards and messages of the pipeline stand in it as "2F0 stage 2
    forward micro-batch 0". Only one rank of each pipeline stage records: the first of its dp and tp
    ranks. with_stack: the Python stack of every op too. Outside a window a step costs nothing more.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        first_step: int = 4,
        num_steps: int = 2,
        every: int | None = None,
        with_stack: bool = False,
    ) -> None:
        if first_step < 1 or num_steps < 1:
            raise IlmCompileError(
                f"profiler: first_step and num_steps must be 1 or above, got {first_step} and "
                f"{num_steps}"
            )
        if every is not None and every < num_steps:
            raise IlmCompileError(
                f"profiler: every must be at least num_steps={num_steps}, got {every}"
            )
        self._folder = Path(folder)
        self._first_step = first_step
        self._num_steps = num_steps
        self._every = every
        self._with_stack = with_stack
        self._profile: profile | None = None
        self._window = (0, 0)

    def on_step_start(self, trainer: Trainer, step: int) -> None:
        if self._profile is not None or not self._begins(step):
            return
        mesh = trainer.parallel.mesh
        if not mesh.is_first_replica:
            return
        self._window = (step, step + self._num_steps - 1)
        activities = [ProfilerActivity.CPU]
        if mesh.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        trainer.parallel.executor.annotate = True
        self._profile = profile(activities=activities, with_stack=self._with_stack)
        self._profile.start()

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._profile is not None and metrics.step >= self._window[1]:
            self._finish(trainer, last=metrics.step)

    def on_stop(self, trainer: Trainer) -> None:
        if self._profile is not None:
            self._finish(trainer, last=trainer.num_steps)

    def _begins(self, step: int) -> bool:
        since = step - self._first_step
        return since == 0 if self._every is None else since >= 0 and since % self._every == 0

    def _finish(self, trainer: Trainer, *, last: int) -> None:
        assert self._profile is not None
        recorded, self._profile = self._profile, None
        trainer.parallel.executor.annotate = False
        recorded.stop()
        rank = trainer.parallel.mesh.rank
        path = self._folder / f"trace-steps-{self._window[0]}-{last}-rank-{rank}.json"
        with whole_file(path) as partial:
            recorded.export_chrome_trace(str(partial))
