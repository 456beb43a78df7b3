"""What is known of one model that nobody here wrote: how to build it, its batches and its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 2  # of a micro-batch
SEQ, VOCAB = 16, 512
IGNORED = -100
BY_ROW = "an expert is called with the rows routed to it, whose number depends on values"

Batch = dict[str, Tensor]
MakeBatch = Callable[[int, torch.Generator], Batch]


@dataclass(frozen=True)
class Layout:
    """A plan of four processes: the keywords of `partition`, and how many data-parallel ranks."""

    dp: int
    keywords: dict[str, Any]


TP_PP, TP_DP, PP_DP = "tp=2 x pp=2", "tp=2 x dp=2", "pp=2 x dp=2"
CHUNKS = "tp=2 x pp=2, 2 chunks"
WHOLE = "tp=2 x pp=2, 1 micro-batch"  # for losses that micro-batches cannot be averaged to
LAYOUTS = {
    TP_PP: Layout(1, {"tp": 2, "pp": 2, "num_microbatches": 4}),
    TP_DP: Layout(2, {"tp": 2, "num_microbatches": 2}),
    "tp=4": Layout(1, {"tp": 4, "num_microbatches": 3}),
    PP_DP: Layout(2, {"pp": 2, "num_microbatches": 3}),
    "pp=4": Layout(1, {"pp": 4, "num_microbatches": 5}),
    CHUNKS: Layout(
        1, {"tp": 2, "pp": 2, "num_chunks": 2, "num_microbatches": 4, "checkpoint": 0.5}
    ),
    "dp=4, zero=3": Layout(4, {"zero": 3, "num_microbatches": 2}),
    WHOLE: Layout(1, {"tp": 2, "pp": 2, "num_microbatches": 1}),
    "dp=4": Layout(4, {"num_microbatches": 1}),
}


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of (rows, seq, vocab) logits, which are for `labels` as is."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of (rows, classes) logits."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED)


def draw(shape: tuple[int, ...], high: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, high, shape, generator=generator)


def uneven_(labels: Tensor, ignored: int = IGNORED) -> Tensor:
    """Ignore another number of labels in each row; where a row has one label, every third row."""
    for row in range(labels.shape[0]):
        if labels.dim() > 1:
            labels[row, : (row * 5) % (labels.shape[1] - 1)] = ignored
        elif row % 3 == 1:
            labels[row] = ignored
    return labels


def tokens(
    *ids: str, seq: int = SEQ, vocab: int = VOCAB, labels: str = "labels", ignored: int = IGNORED
) -> MakeBatch:
    """Batches of token ids under each of the names, "input_ids" if none, and a label for each."""

    def make(rows: int, generator: torch.Generator) -> Batch:
        batch = {name: draw((rows, seq), vocab, generator) for name in ids or ("input_ids",)}
        return batch | {labels: uneven_(draw((rows, seq), vocab, generator), ignored)}

    return make


@dataclass(frozen=True)
class Outside:
    """One line of the table.

    build: the model, the same each time it is called, on any rank. batch: called with a number of
    rows and a generator. layout: a key of `LAYOUTS`. tolerance: of loss and weights, relative;
    where it is not the default, `reason` says why. refusal: why `partition` is right to refuse it.
    """

    source: str
    build: Callable[[], nn.Module]
    layout: str = "tp=2 x pp=2"
    batch: MakeBatch = field(default_factory=tokens)
    loss_fn: Callable[[Any, Tensor], Tensor] | None = None
    tolerance: float = 1e-9
    reason: str = ""
    refusal: str = ""

    @property
    def plan(self) -> Layout:
        return LAYOUTS[self.layout]

    @property
    def keywords(self) -> dict[str, Any]:
        """What `partition` is given beside the model: the plan, the loss, one micro-batch."""
        batch = self.batch(ROWS, torch.Generator())
        example = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
        return {**self.plan.keywords, "loss_fn": self.loss_fn, "example_inputs": example}

    def global_batch(self, step: int) -> Batch:
        """Return the batch of all micro-batches of all data-parallel ranks of one step."""
        rows = ROWS * self.plan.dp * self.plan.keywords["num_microbatches"]
        return self.batch(rows, torch.Generator().manual_seed(step))


class LossOf(nn.Module):
    """A model and how its loss is read: `pick(model, ids, labels)`.

    For models whose own loss is neither their first output nor named.
    """

    def __init__(
        self, model: nn.Module, pick: Callable[[nn.Module, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.model = model
        self.pick = pick

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.pick(self.model, ids, labels)


def classified_images(
    rows: int,
    generator: torch.Generator,
    *,
    name: str = "img",
    side: int = 16,
    channels: int = 3,
    classes: int = 10,
) -> Batch:
    """A square image for each row under `name`, and a class."""
    shape = (rows, channels, side, side)
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {name: pixels, "labels": uneven_(draw((rows,), classes, generator))}
