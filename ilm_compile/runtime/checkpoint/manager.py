"""`CheckpointManager`: saves a run while it goes on, and puts it back under any plan."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ilm_compile.runtime.agree import any_rank, broadcast, first_problem
from ilm_compile.runtime.checkpoint.agreement import describe as describe_error
from ilm_compile.runtime.checkpoint.agreement import together
from ilm_compile.runtime.checkpoint.contents import Stateful
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.keeper import Keeper
from ilm_compile.runtime.checkpoint.manifest import Manifest
from ilm_compile.runtime.checkpoint.parts import Part
from ilm_compile.runtime.checkpoint.retention import step_name, step_of
from ilm_compile.runtime.checkpoint.save import write_part
from ilm_compile.runtime.checkpoint.slices import has_manifest, read_manifest
from ilm_compile.runtime.checkpoint.sound import check_files
from ilm_compile.runtime.checkpoint.space import check_space, estimate, probe
from ilm_compile.runtime.checkpoint.stop_file import Order, StopFile
from ilm_compile.runtime.checkpoint.storage import Storage, open_storage, remove
from ilm_compile.runtime.checkpoint.training_state import (
    ALL,
    Loading,
    Settings,
    TrainingState,
    anything,
)
from ilm_compile.runtime.checkpoint.written import check_written, cover, fill, tables
from ilm_compile.runtime.guard.activity import ACTIVITY
from ilm_compile.runtime.hooks import Hook
from ilm_compile.runtime.parallel import Parallel

if TYPE_CHECKING:
    from ilm_compile.runtime.metrics import StepMetrics
    from ilm_compile.runtime.trainer import Trainer


class CheckpointManager(Hook):
    """Checkpoints of `parallel`, `optimizer` and `states` in `folder`, one folder per step.

        manager = CheckpointManager("local:ckpt", parallel, optimizer=optimizer,
                                    states={"scheduler": ..., "sampler": ...}, every=100)
        manager.prepare()                 # early: writable, enough space, leftovers cleaned
        step = manager.resume() or 0      # from the newest complete one, if there is one
        for step in range(step + 1, last + 1):
            ...
            if manager.after_step(step):  # saves when due; True: the stop file says to end
                break
        manager.close()                   # the last save is complete

    Or give it to `Trainer.fit` as a hook, which does all but `resume`. Every method is collective:
    call it on all ranks alike, in the main thread; an error on one rank is raised on all.

    folder: a path, ``local:PATH`` or an fsspec URL (``s3://BUCKET/PATH``) that all ranks share; one
    job at a time. optimizer: over ``parallel.named_parameters()``. states: objects whose
    `state_dict` is plain JSON and the same on every rank, by a name that stays. config: plain JSON,
    for people and for `accept` of `load`. every: steps between saves; 0 saves only where told.
    keep_last: so many newest sound ones stay, and those of every `keep_every` steps for good (0:
    none). asynchronous: a thread writes while training goes on; the next call raises its errors.
    stop_file: see `StopFile`.
    """

    def __init__(
        self,
        folder: str | Path,
        parallel: Parallel,
        *,
        optimizer: Optimizer | None = None,
        states: Mapping[str, Stateful] | None = None,
        config: Mapping[str, Any] | None = None,
        every: int = 0,
        keep_last: int = 2,
        keep_every: int = 0,
        asynchronous: bool = True,
        stop_file: str | Path | None = None,
    ) -> None:
        _check_options(every, keep_last, keep_every)
        self._storage = open_storage(folder)
        self._state = TrainingState(parallel, optimizer, dict(states or {}))
        self._mesh = parallel.mesh
        self._config = dict(config or {})
        self._every = every
        self._keep_last = keep_last
        self._asynchronous = asynchronous
        self._stop_file = None if stop_file is None else StopFile(Path(stop_file))
        self._base: int | None = None  # the step of the folder's that this run goes on from
        self._may_write = False
        self._nonce = ""  # of this run, the same on every rank, once prepared
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._keeper = Keeper(
            self._storage,
            self._mesh,
            self._thread,
            partial(self._steps, complete=True),
            keep_last=keep_last,
            keep_every=keep_every,
        )
        self._soundness = self._keeper.soundness
        self._in_flight: tuple[Future[None], Manifest, int] | None = None
        self._order = Order()
        self._failed = False

    def prepare(self) -> None:
        """Check that saving will work, delete what killed saves left; the other calls do it too.

        Raises `CheckpointError` on every rank if the folder cannot be written or has no room for
        one checkpoint of this model and optimizer; warns if it has none for all that are kept.
        """
        if self._nonce:
            return
        self._nonce = broadcast(os.urandom(4).hex().encode(), self._mesh).decode()
        self._keeper.clean()
        with together(self._mesh, f"checkpoint folder {self._storage.url}"):
            if self._mesh.rank == 0:
                check_space(
                    self._storage,
                    estimate(self._state.parallel, self._state.optimizer),
                    num_kept=self._keep_last - len(self._steps(complete=True)),
                )
                probe(self._storage, self._nonce)
                if self._stop_file is not None:
                    self._stop_file.create()

    @ACTIVITY.during("saving a checkpoint")
    def save(self, step: int, *, wait: bool = False) -> None:
        """Save the state after `step` steps; returns before it is written unless `wait`.

        Waits for an earlier save first. The save is complete, and visible to `latest` and `resume`,
        after a later call of any method that finds it written on all ranks. Raises
        `CheckpointError` if the folder holds checkpoints that this run does not go on from, and, at
        the latest in that later call, if the state is not finite: then there is none of this step.
        """
        self._begin()
        self._advance(wait=True)
        working = self._storage.working_name(step_name(step), self._nonce)
        with together(self._mesh, f"checkpoint of step {step}"):
            if self._mesh.rank == 0:
                self._storage.prepare(working)
        with together(self._mesh, f"checkpoint of step {step}"):
            pieces, groups = self._state.snapshot()
            manifest = self._state.describe(step, self._config)
        pieces += self._state.mapped()
        given = tables(pieces, groups, self._mesh)
        manifest.save = f"{step}-{self._nonce}"
        with together(self._mesh, f"checkpoint of step {step}"):
            if self._mesh.rank == 0:
                fill(manifest, given)
        part = Part(manifest.save, self._mesh.rank)
        written = self._thread.submit(write_part, self._storage, working, part, pieces, groups)
        self._in_flight = (written, manifest, cover(pieces))
        if wait or not self._asynchronous:
            self._advance(wait=True)

    def after_step(self, step: int, *, last: bool = False) -> bool:
        """Do what is due after `step`; returns whether the stop file says to end the training.

        Completes an earlier save that is written, and saves if `every`, the stop file or `last`
        say so. Raises `CheckpointError` if an earlier save failed.
        """
        order = self._read_order(step)
        self._after_step(step, order, last=last)
        return order.stop

    def latest(self) -> int | None:
        """The step of the newest checkpoint with a final name and a manifest, None if none has."""
        self.prepare()
        self._advance(wait=False)
        return next(iter(self._candidates(complete=True)), None)

    @ACTIVITY.during("loading the newest checkpoint")
    def resume(
        self,
        content: Iterable[str] = (ALL,),
        *,
        settings: Settings = "saved",
        accept: Callable[[Manifest], None] = anything,
    ) -> int | None:
        """Load the newest sound checkpoint; returns its step, or None if there is none at all.

        A damaged or incomplete one, and one whose numbers are not finite, is left out with a
        warning that names the file. Raises `CheckpointError` if none is left then, for a run must
        not begin anew over them unasked, and for one that is whole but of another model or
        optimizer. content, settings, accept: as for `load`.
        """
        self.prepare()
        self._advance(wait=True)
        faults: list[str] = []
        for step in self._candidates():
            try:
                manifest = self._verified(self._storage, step_name(step))
            except CheckpointError as error:
                self._soundness.note(step, False)
                faults.append(f"checkpoint of step {step} is left out: {error}")
                continue
            self._tell(f"{fault}; step {step} is the newest sound one" for fault in faults)
            how = Loading(content, settings, accept)
            self._state.restore(self._storage, step_name(step), manifest, how)
            self._base = step
            return step
        if faults:
            raise CheckpointError(
                f"{self._storage.url}: none of its checkpoints can be gone on from, and a new run "
                f"does not begin over them: {'; '.join(faults)}; restore one, or, to begin anew, "
                "move them away or choose another folder"
            )
        return None

    @ACTIVITY.during("loading a checkpoint")
    def load(
        self,
        source: int | str | Path,
        content: Iterable[str] = (ALL,),
        *,
        settings: Settings = "saved",
        accept: Callable[[Manifest], None] = anything,
    ) -> int:
        """Load one checkpoint, no other in its stead; returns its step.

        source: a step of this manager's folder, or the path or URL of a checkpoint's folder.
        content: of "model", "optimizer", "random" and the names of `states`; "all" for all that
        this manager has. settings: whether the optimizer goes on with the learning rate, weight
        decay and so on it was saved with, which is warned of where its own differ, or with its
        own. accept: called with the manifest before anything is changed; raises to refuse. Raises
        `CheckpointError` naming the file that is missing or damaged, or what the checkpoint does
        not hold. The weights may be changed in part after an error in reading.
        """
        self.prepare()
        self._advance(wait=True)
        if isinstance(source, int):
            storage, name = self._storage, step_name(source)
        else:
            parent, _, name = str(source).rstrip("/").rpartition("/")
            storage = open_storage(parent or ".")
        manifest = self._verified(storage, name)
        self._state.restore(storage, name, manifest, Loading(content, settings, accept))
        if storage.url == self._storage.url:
            self._base = manifest.step
        return manifest.step

    def wait(self) -> None:
        """Return when the save in flight, if any, is complete."""
        self._advance(wait=True)

    def close(self) -> None:
        """`wait`, then end the thread."""
        self._advance(wait=True)
        self._thread.shutdown()

    # As a hook of Trainer.fit

    def on_start(self, trainer: Trainer) -> None:
        """`prepare`, and find out whether saving is allowed, as `save` does."""
        self._begin()

    def on_step_start(self, trainer: Trainer, step: int) -> None:
        """Read the stop file, so that a step that it ends at is known to be the last."""
        self._order = self._read_order(step)
        if self._order.stop:
            trainer.request_stop("stop file")

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Save if due."""
        is_last = trainer.stop_reason is not None or metrics.step == trainer.total_steps
        self._after_step(metrics.step, self._order, last=is_last)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Other ranks may be gone: leave the save in flight incomplete."""
        self._failed = True

    def on_stop(self, trainer: Trainer) -> None:
        """Complete the save in flight."""
        if not self._failed:
            self.wait()

    def _read_order(self, step: int) -> Order:
        """What the stop file says, by rank 0's reading."""
        if self._stop_file is None:
            return Order()
        own = self._stop_file.order(step) if self._mesh.rank == 0 else Order()
        return Order(*any_rank([own.save, own.stop], self._mesh))

    def _after_step(self, step: int, order: Order, *, last: bool) -> None:
        self._advance(wait=False)
        if order.save or last or (self._every and step % self._every == 0):
            self.save(step)

    @ACTIVITY.during("completing a checkpoint")
    def _advance(self, *, wait: bool) -> None:
        """Complete the save in flight once all ranks have written their part."""
        self._complete(wait=wait)
        self._keeper.advance(wait=wait)

    def _complete(self, *, wait: bool) -> None:
        if self._in_flight is None:
            return
        written, manifest, own_cover = self._in_flight
        if wait:
            written.exception()
        (is_pending,) = any_rank([not written.done()], self._mesh)
        if is_pending:
            return
        self._in_flight = None
        task = f"checkpoint of step {manifest.step} in {self._storage.url}"
        working = self._storage.working_name(step_name(manifest.step), self._nonce)
        error = written.exception()
        problem = first_problem("" if error is None else describe_error(error), self._mesh)
        if not problem:
            found = check_written(self._storage, working, manifest, own_cover, self._mesh)
            problem = first_problem("".join(found), self._mesh)
        if problem:
            if self._mesh.rank == 0:
                remove(self._storage, working)
            newest = next(iter(self._candidates(complete=True)), None)
            left = "there is none" if newest is None else f"the newest is that of step {newest}"
            raise CheckpointError(f"{task} was not written: {problem}; {left}") from error
        with together(self._mesh, task):
            if self._mesh.rank == 0:
                self._publish(working, manifest)
        self._soundness.note(manifest.step, True)
        self._keeper.begin()

    def _publish(self, working: str, manifest: Manifest) -> None:
        try:
            self._storage.publish(working, step_name(manifest.step), manifest.to_bytes())
        except Exception:
            remove(self._storage, working)
            raise

    def _verified(self, storage: Storage, name: str) -> Manifest:
        """The manifest of a checkpoint whose files are all there, unchanged and finite.

        Each rank reads its share of the files.
        """
        with together(self._mesh, "load"):
            manifest = read_manifest(storage, name)
            check_files(storage, name, manifest, rank=self._mesh.rank, size=self._mesh.world_size)
        if storage.url == self._storage.url:
            self._soundness.note(manifest.step, True)
        return manifest

    def _begin(self) -> None:
        """`prepare`, and refuse a folder that holds what this run does not go on from."""
        self.prepare()
        if self._may_write:
            return
        newest = -1 if self._base is None else self._base
        others = [s for s in self._candidates() if s > newest and not self._soundness.is_known(s)]
        if others:
            where = "begins anew" if self._base is None else f"goes on from step {self._base}"
            raise CheckpointError(
                f"{self._storage.url} holds checkpoints of steps {others[:5]}, and this run "
                f"{where}; go on from the newest (resume, ckpt.auto_resume), move them away, or "
                "choose another folder"
            )
        self._may_write = True

    def _tell(self, messages: Iterable[str]) -> None:
        for message in messages:
            if self._mesh.rank == 0:
                warnings.warn(message, stacklevel=2)

    def _candidates(self, *, complete: bool = False) -> list[int]:
        """The steps with a final name, newest first, as rank 0 sees them."""
        own = self._steps(complete=complete) if self._mesh.rank == 0 else []
        steps: list[int] = json.loads(broadcast(json.dumps(own).encode(), self._mesh))
        return sorted(steps, reverse=True)

    def _steps(self, *, complete: bool) -> list[int]:
        """The steps that have a folder with a final name; `complete`: and a manifest."""
        return [
            step
            for name in self._storage.folders()
            if (step := step_of(name)) is not None
            and (not complete or has_manifest(self._storage, name))
        ]


def _check_options(every: int, keep_last: int, keep_every: int) -> None:
    if every < 0 or keep_last < 1 or keep_every < 0:
        raise CheckpointError(
            "checkpoints: expected every >= 0, keep_last >= 1 and keep_every >= 0, got "
            f"every={every}, keep_last={keep_last}, keep_every={keep_every}"
        )
