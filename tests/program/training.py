"""Trains a model through `ilm_compile.parallelize` in one process, beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ilm_compile
from ilm_compile.program.trace import call_model

VOCAB, WIDTH, SEQ, ROWS = 32, 8, 6, 4


class LM(nn.Module):
    """Embedding, an inner layer through any function of the model, head and loss; float64."""

    def __init__(self, inner: Callable[[LM, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH, dtype=torch.float64)
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
        self.inner = inner
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def mix(self, h: Tensor) -> Tensor:
        """Return what lies between embedding and head; sub-classes write it."""
        if self.inner is not None:
            return self.inner(self, h)
        out: Tensor = self.layer(h)
        return out

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.mix(self.embed(input_ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def tokens(rows: int = ROWS) -> dict[str, Tensor]:
    """Random ids, which are also the labels; some are ignored."""
    ids = torch.randint(0, VOCAB, (rows, SEQ), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :2] = -100
    return {"input_ids": ids, "labels": labels}


def assert_trains_equal(
    model: nn.Module,
    batch: Mapping[str, Tensor] | None = None,
    *,
    num_microbatches: int = 2,
    arguments: Mapping[str, Any] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    before_plain: Callable[[], object] = int,
) -> ilm_compile.Parallel:
    """Loss and every gradient of one step equal plain PyTorch's, to 1e-10."""
    batch = tokens() if batch is None else batch
    rows = {n: value[: len(value) // num_microbatches] for n, value in batch.items()}
    parallel = ilm_compile.parallelize(
        model,
        num_microbatches=num_microbatches,
        example_inputs={**rows, **(arguments or {})},
        loss_fn=loss_fn,
    )
    got = parallel.execute_schedule(batch)
    before_plain()
    expected = call_model(model, batch, loss_fn, arguments)["loss"]
    model.zero_grad()
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(got, expected.detach(), rtol=1e-10, atol=0)
    found = parallel.full_gradients()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is None or not grad.any():
            assert name not in found or not found[name].any(), name
            continue
        grad = grad.to_dense()
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-14, msg=name)
    return parallel
