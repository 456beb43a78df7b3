"""Evaluation on the parallel model: loss, perplexity and accuracy, in all and by type of text.

The numbers are taken where the loss is computed, from the very logits and targets that the traced
model gives to its cross entropy, so they mean the same for every model (one that shifts its labels
itself, too) and every plan. Per micro-batch it costs one more pass over the rank's own part of the
logits and, if the vocabulary is sharded, three all-reduces of one or two numbers per token; whole
logits are never gathered nor kept. Over dp and pp there is one all-reduce, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from ilm_compile.errors import BatchError, IlmCompileError, NoTargetsError
from ilm_compile.program.layout import Layout
from ilm_compile.program.token_metrics import TokenMetrics
from ilm_compile.runtime.agree import first_problem
from ilm_compile.runtime.batch import Batch, says_local
from ilm_compile.runtime.data import TYPE_IDS
from ilm_compile.runtime.forms import Form
from ilm_compile.runtime.loss_probe import last_stage, probe
from ilm_compile.runtime.parallel import Parallel
from ilm_compile.schedule import Kind, forward_only


def evaluate(
    parallel: Parallel,
    batches: Iterable[Batch],
    *,
    types: Mapping[str, int] | None = None,
    batch_is_local: bool = False,
) -> dict[str, float]:
    """Return the metrics of all tokens of `batches`, the same on every rank. Collective.

    batches: as for training, global ones or with `batch_is_local` this data-parallel rank's rows
    of them; one without any target is passed over. types: the number of each type of text; batches
    then have "type_ids", (rows, seq_len), as `TokenDataset` gives with `with_types` (in other
    batches it is not looked at).

    "loss" is the mean cross entropy of all targets of all batches (every token counts the same, a
    label smoothing is left out, and so are other terms of the model's loss), "perplexity" its
    exponential, "accuracy" the share of targets that have the largest logit, "num_tokens" the
    number of targets. With `types` there is each of the four for each type that has targets, as
    "loss/en". Dropout is off meanwhile; afterwards `parallel` is in training mode. Raises
    `IlmCompileError` if the program has no cross entropy of class numbers or nothing was counted.
    """
    totals = _Totals(parallel, types)
    parallel.eval()
    try:
        told = ((batch, says_local(batch) or batch_is_local) for batch in batches)
        # The graph of each shape has its own cross entropy.
        for _, alike in groupby(told, lambda pair: _form(parallel, *pair)):
            with probe(parallel, totals.add):
                for batch, is_local in alike:
                    totals.start(batch, is_local=is_local)
                    with suppress(NoTargetsError):  # on every rank alike, before anything is run
                        parallel.execute_schedule(
                            _inputs(batch),
                            forward_only=True,
                            return_loss=False,
                            batch_is_local=is_local,
                        )
    finally:
        parallel.train()
    return totals.metrics()


def _form(parallel: Parallel, batch: Batch, is_local: bool) -> Form:
    """What runs the batch; what is wrong with it is raised on every rank when it is to run."""
    try:
        return parallel.prepare(_inputs(batch), is_local=is_local)
    except BatchError:
        return parallel.form


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in batch if name != TYPE_IDS}


class _Totals:
    """Counts, losses and hits of each type: (types, 3) float64, of this rank's micro-batches."""

    def __init__(self, parallel: Parallel, types: Mapping[str, int] | None) -> None:
        self._mesh = parallel.mesh
        self._num_microbatches = parallel.schedule.num_microbatches
        self._types = types
        self._order = _order(parallel)
        self._pending: list[int] = []
        self._type_rows: list[Tensor] = []
        size = 1 if types is None else max(types.values(), default=0) + 1
        self._sums = torch.zeros(size, 3, dtype=torch.float64, device=self._mesh.device)

    def start(self, batch: Batch, *, is_local: bool) -> None:
        """Begin a batch. Collective."""
        self._pending = list(self._order)
        if self._types is None:
            return
        problem = ""
        if TYPE_IDS not in batch:
            problem = (
                f"expected {TYPE_IDS} in every batch, got {', '.join(sorted(batch))}; open the "
                "data set with_types=True, or leave types out"
            )
        elif (rows := batch[TYPE_IDS]).min() < 0 or rows.max() >= len(self._sums):
            problem = (
                f"expected {TYPE_IDS} among {dict(self._types)}, got numbers from "
                f"{int(rows.min())} to {int(rows.max())}"
            )
        if problem := first_problem(problem, self._mesh):
            raise IlmCompileError(f"evaluate: {problem}")
        own = rows if is_local else rows.chunk(self._mesh.dp.size)[self._mesh.dp.rank]
        self._type_rows = list(own.chunk(self._num_microbatches))

    def add(self, metrics: TokenMetrics, layout: Layout, shape: torch.Size) -> None:
        """Add one micro-batch; its targets, of local `shape`, lie as `layout` says."""
        microbatch, axes = self._pending.pop(0), self._mesh.axes.items()
        if any(axis.rank and not layout.on(name).is_shard for name, axis in axes):
            return
        columns = [metrics.counted, metrics.losses, metrics.hits]
        values = torch.stack([column.double() for column in columns], dim=1)
        if self._types is None:
            self._sums[0] += values.sum(0)
            return
        whole = layout.global_shape(shape, self._mesh.place.sizes)
        types = self._types_of(microbatch, math.prod(whole)).view(whole)
        own = layout.cut(types, self._mesh.place).flatten().to(values.device)
        self._sums.index_add_(0, own, values)

    def metrics(self) -> dict[str, float]:
        """The metrics of everything that all ranks added."""
        if self._mesh.is_distributed:
            dist.all_reduce(self._sums, group=self._mesh.group)
        result = _metrics(self._sums.sum(0), "")
        if not result:
            raise IlmCompileError("evaluate: expected batches with targets, got no target at all")
        for name, number in (self._types or {}).items():
            result |= _metrics(self._sums[number], f"/{name}")
        return result

    def _types_of(self, microbatch: int, num_tokens: int) -> Tensor:
        """The type of each token that the loss is told of: those at the end of every row.

        A loss that is given logits[:, :-1] and labels[:, 1:] has a token less in each row.
        """
        rows = self._type_rows[microbatch]
        each, rest = divmod(num_tokens, len(rows))
        if rest or not 0 < each <= rows.shape[1]:
            raise IlmCompileError(
                f"evaluate: the cross entropy has {num_tokens} tokens a micro-batch, expected "
                f"at most the {rows.numel()} of {TYPE_IDS} of shape {tuple(rows.shape)}, as many "
                "in each row; leave types out"
            )
        return rows[:, rows.shape[1] - each :].flatten()


def _metrics(sums: Tensor, suffix: str) -> dict[str, float]:
    count, loss, hits = sums.tolist()
    if count == 0:
        return {}
    mean = loss / count
    return {
        f"loss{suffix}": mean,
        f"perplexity{suffix}": math.exp(mean) if mean < 700 else mean if mean != mean else math.inf,
        f"accuracy{suffix}": hits / count,
        f"num_tokens{suffix}": int(count),
    }


def _order(parallel: Parallel) -> list[int]:
    """The micro-batches in the order in which this rank runs the last stage."""
    stage = last_stage(parallel)
    if stage is None:
        return []
    row = forward_only(parallel.schedule).actions[parallel.mesh.pp.rank]
    return [a.microbatch for a in row if a.kind is Kind.F and a.stage == stage.index]
