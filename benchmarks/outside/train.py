"""Five AdamW steps of one model in real processes, beside the same steps of plain PyTorch."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import ilm_compile
from benchmarks.outside.entry import Batch, Outside
from ilm_compile.errors import IlmCompileError
from ilm_compile.proof.promote import promoted_float32
from ilm_compile.runtime.optimizer import adamw

STEPS = 5
LEARNING_RATE = 1e-3
MAX_NORM = 1.0


@dataclass(frozen=True)
class Trained:
    """Largest relative errors of a run, or why there was none (`refused`).

    `worst` names the parameter or buffer with the largest error; `missing` those of the model's
    state dict that the run did not give back.
    """

    loss_error: float | None = None
    weight_error: float | None = None
    worst: str = ""
    missing: tuple[str, ...] = ()
    refused: str = ""
    seconds: float = 0.0

    def agrees(self, tolerance: float) -> bool:
        """Whether every loss and every tensor of the state dict is within the tolerance."""
        errors = (self.loss_error, self.weight_error)
        return not self.missing and all(e is not None and e <= tolerance for e in errors)

    def difference(self) -> str:
        """Return what does not agree, in words."""
        if self.refused:
            return self.refused
        missing = f"the state dict lacks {', '.join(self.missing)}; " if self.missing else ""
        return f"{missing}largest error in {self.worst}"


def train_both(rank: int, entry_name: str, layout: str = "") -> Trained | None:
    """Train the named model on this rank; rank 0 trains it alone too and returns the errors."""
    from benchmarks.outside import entry_of

    entry = entry_of(entry_name, layout)
    start = time.perf_counter()
    with promoted_float32():
        model = entry.build()
        try:
            losses, state = _parallel(entry, model)
        except IlmCompileError as error:
            return Trained(refused=f"{type(error).__name__}: {error}")
        if rank != 0:
            return None
        expected = plain_losses(entry, model)
    loss_error = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    errors = weight_errors(state, model.state_dict())
    worst = max(errors, key=errors.__getitem__, default="")
    return Trained(
        loss_error=loss_error,
        weight_error=errors.get(worst, 0.0),
        worst=worst,
        missing=tuple(name for name in model.state_dict() if name not in state),
        seconds=time.perf_counter() - start,
    )


def _parallel(entry: Outside, model: nn.Module) -> tuple[list[float], dict[str, Tensor]]:
    parallel = ilm_compile.parallelize(model, **entry.keywords)
    optimizer = adamw(parallel.named_parameters(), lr=LEARNING_RATE)
    trainer = ilm_compile.Trainer(parallel, optimizer=optimizer, max_grad_norm=MAX_NORM)
    losses = []
    for step in range(STEPS):
        trainer.zero_grad()
        losses.append(float(trainer.execute_schedule(entry.global_batch(step))))
        trainer.step()
    return losses, parallel.full_state_dict()


def plain_losses(entry: Outside, model: nn.Module) -> list[float]:
    """Train `model` in place with torch alone and return the loss of each step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2]
    rest = [p for p in trainable if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = plain_loss(entry, model, entry.global_batch(step))
        loss.backward()
        clip_grad_norm_(trainable, MAX_NORM)
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain_loss(entry: Outside, model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of the whole batch, as a script for one device would ask for it."""
    inputs = dict(batch)
    labels = inputs.pop("labels") if entry.loss_fn else None
    outputs = model(**inputs)
    if entry.loss_fn is not None and labels is not None:
        return entry.loss_fn(outputs, labels)
    return outputs if isinstance(outputs, Tensor) else outputs.loss


def weight_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative error of each tensor that both have."""
    found = {}
    for name in got.keys() & want.keys():
        expected = want[name].double()
        difference = float((got[name].double() - expected).norm())
        found[name] = difference and difference / float(expected.norm())
    return found
