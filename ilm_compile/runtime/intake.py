"""A step's batch on its way in: cut to this rank's rows, looked at, what a loss needs counted.

No rank looks at rows that it does not work on. What each finds is put together in one sum over all
ranks, so that the counts are of the global batch and an error on one rank is raised on all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ilm_compile.errors import BatchError
from ilm_compile.runtime.agree import first_problem
from ilm_compile.runtime.batch import Batch
from ilm_compile.runtime.batch_checks import SameBatch, check_ids
from ilm_compile.runtime.forms import Form
from ilm_compile.runtime.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Taken:
    """rows: this rank's. counts: of the global batch, such as the targets of each loss."""

    rows: Batch
    counts: dict[str, Tensor]


class Intake:
    """Takes the batches of one rank. nothing: what every program counts, with zeros."""

    def __init__(self, nothing: Mapping[str, Tensor], mesh: Mesh) -> None:
        self._nothing, self._mesh = dict(nothing), mesh
        self._same = SameBatch(mesh)

    def take(
        self,
        batch: Batch,
        choose: Callable[[], Form],
        *,
        is_local: bool = False,
        on_device: bool = False,
    ) -> Taken:
        """This rank's part of a batch. Collective.

        choose: gives what runs it, or raises `BatchError`. is_local: `batch` is that part already.
        on_device: look at ids on a GPU too. Raises `BatchError` on every rank if any was given a
        wrong batch, or now and then if ranks that shall have the same were not given it.
        """
        error: BatchError | None = None
        rows, counts = batch, dict(self._nothing)
        try:
            form = choose()
            layout = form.step_inputs.layout
            rows = batch if is_local else layout.own(batch)
            check_ids(
                rows,
                form.lookups,
                num_slices=layout.num_microbatches,
                first_slice=layout.dp.rank * layout.num_microbatches,
                on_device=on_device,
            )
            counts |= form.step_inputs.count(rows)
        except BatchError as raised:
            error = raised
        problem_found = torch.tensor(error is not None)
        problems, *totals = self._sums([problem_found, *counts.values()])
        if problems:
            problem = first_problem("" if error is None else str(error), self._mesh)
            raise BatchError(problem) from error
        self._same.check(batch, is_local=is_local)
        return Taken(rows, dict(zip(counts, totals, strict=True)))

    def _sums(self, own: Sequence[Tensor]) -> list[Tensor]:
        """The first number summed over all ranks, the others over data-parallel ranks."""
        mesh = self._mesh
        if (ranks := mesh.everyone).size == 1:
            return list(own)
        if mesh.pp.rank or not mesh.speaks:  # they have the same rows as the first
            own = [own[0], *map(torch.zeros_like, own[1:])]
        flat = torch.cat([value.flatten().double() for value in own])  # exact up to 2**53
        total: Tensor = ranks.all_reduce(flat.to(mesh.device)).cpu()
        parts = torch.split(total, [value.numel() for value in own])
        return [part.view_as(v).to(v.dtype) for part, v in zip(parts, own, strict=True)]
