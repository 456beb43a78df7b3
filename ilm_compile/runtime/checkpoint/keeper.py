"""Which checkpoints of a folder stay: found out by all ranks together, each for its share."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

from ilm_compile.runtime.agree import any_rank, broadcast
from ilm_compile.runtime.checkpoint.agreement import together
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
        steps: list[int] = self._of_rank_0(self._steps)
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
            else:
                names = self._of_rank_0(partial(self._retire, set(steps)))
                self._thread.submit(self._delete, names)

    def clean(self) -> None:
        """Delete what killed saves left. Collective; an error on one rank is raised on all."""
        task = f"checkpoint folder {self._storage.url}"
        left: list[str] = []
        with together(self._mesh, task):
            if self._mesh.rank == 0:
                left = self._storage.left_over()
        left = self._of_rank_0(lambda: left)
        with together(self._mesh, task):
            for name in left:
                self._delete_share(name)

    def _look(self, steps: list[int]) -> list[bool]:
        return [self.soundness.is_sound(step) for step in steps]

    def _retire(self, sound: set[int]) -> list[str]:
        """Take away the good names of what is superseded; returns those to delete."""
        steps = superseded(
            self._steps(),
            keep_last=self._keep_last,
            keep_every=self._keep_every,
            is_sound=sound.__contains__,
        )
        try:
            return [*self._storage.replaced(), *(self._storage.retire(step_name(s)) for s in steps)]
        except OSError as error:
            self._warn(error)
            return []

    def _delete(self, names: list[str]) -> None:
        try:
            for name in names:
                self._delete_share(name)
        except OSError as error:
            self._warn(error)

    def _delete_share(self, name: str) -> None:
        self._storage.delete_folder(name, rank=self._mesh.rank, size=self._mesh.world_size)

    def _warn(self, error: OSError) -> None:
        """Training goes on: what is not deleted now is at the next start."""
        warnings.warn(
            f"{self._storage.url}: an old checkpoint cannot be deleted: {error}", stacklevel=3
        )

    def _of_rank_0(self, find: Callable[[], list[Any]]) -> list[Any]:
        """What rank 0 finds, on every rank. Collective."""
        found = find() if self._mesh.rank == 0 else []
        result: list[Any] = json.loads(broadcast(json.dumps(found).encode(), self._mesh))
        return result
