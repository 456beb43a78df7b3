"""Which checkpoints of a folder stay: found out by all ranks together, each for its share."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Executor, Future

from ilm_compile.runtime.agree import any_rank, broadcast
from ilm_compile.runtime.checkpoint.retention import step_name, superseded
from ilm_compile.runtime.checkpoint.sound import Soundness
from ilm_compile.runtime.checkpoint.storage import Storage
from ilm_compile.runtime.mesh import Mesh


class Keeper:
    """Deletes what newer sound checkpoints supersede; see `CheckpointManager` for the numbers.

    thread: where files are looked at and deleted. steps: the steps that have a complete checkpoint,
    as rank 0 sees them.
    """

    def __init__(
        self,
        storage: Storage,
        mesh: Mesh,
        thread: Executor,
        steps: Callable[[], list[int]],
        *,
        keep_last: int,
        keep_every: int,
    ) -> None:
        self.soundness = Soundness(storage, rank=mesh.rank, size=mesh.world_size)
        self._storage, self._mesh, self._thread, self._steps = storage, mesh, thread, steps
        self._keep_last, self._keep_every = keep_last, keep_every
        self._looking: tuple[list[int], Future[list[bool]]] | None = None

    def begin(self) -> None:
        """Look at the newest, for one more is complete. Collective."""
        own = self._steps() if self._mesh.rank == 0 else []
        steps: list[int] = json.loads(broadcast(json.dumps(own).encode(), self._mesh))
        good = [step for step in sorted(steps, reverse=True) if not self.soundness.is_bad(step)]
        wanted = good[: self._keep_last]
        self._looking = wanted, self._thread.submit(self._look, wanted)

    def advance(self, *, wait: bool) -> None:
        """Delete once all ranks have looked. Collective while they do."""
        while self._looking is not None:
            steps, looked = self._looking
            if wait:
                looked.result()
            (is_pending,) = any_rank([not looked.done()], self._mesh)
            if is_pending:
                return
            self._looking = None
            bad = any_rank([not is_good for is_good in looked.result()], self._mesh)
            for step, is_bad in zip(steps, bad, strict=True):
                self.soundness.note(step, not is_bad)
            if any(bad):
                self.begin()  # older ones must do
            elif self._mesh.rank == 0:
                self._thread.submit(self._delete, set(steps))

    def _look(self, steps: list[int]) -> list[bool]:
        return [self.soundness.is_sound(step) for step in steps]

    def _delete(self, sound: set[int]) -> None:
        for step in superseded(
            self._steps(),
            keep_last=self._keep_last,
            keep_every=self._keep_every,
            is_sound=sound.__contains__,
        ):
            self._storage.remove(step_name(step))
