"""Several optimizer steps under a plan beside the same steps of the single-device model."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import ilm_compile
from ilm_compile.runtime.optimizer import adamw
from tests.support.equality import SEQ, Case, Errors, compare, make_batch, make_model, reference
from tests.support.promote import promoted_float32
from tests.support.traced import traced_once


class Trained(NamedTuple):
    """Relative differences; 0 but for `copies` on ranks other than 0, which see no full values."""

    weights: float  # the largest of a weight after the steps
    copies: float  # of tied copies of a weight
    first: Errors  # of the first step's loss and gradients


def train_and_compare(rank: int, case: Case, num_steps: int) -> Trained:
    """Return how far some optimizer steps under a plan are from those on one device."""
    with promoted_float32():
        model = make_model(case.model)
        example = {name: ((2, SEQ), torch.int64) for name in ("input_ids", "labels")}
        with traced_once((case.model, case.packed)):
            parallel = ilm_compile.parallelize(model, example_inputs=example, **case.plan)
        trainer = ilm_compile.Trainer(
            parallel, optimizer=adamw(parallel.named_parameters(), lr=1e-3), max_grad_norm=1.0
        )
        optimizer = adamw(model.named_parameters(), lr=1e-3)
        first = Errors(0.0, 0.0, "")
        batch = make_batch(2 * parallel.plan.num_microbatches * case.dp)
        for step in range(num_steps):
            shifted = {**batch, "input_ids": (batch["input_ids"] + step) % 512}
            trainer.zero_grad()
            loss = trainer.execute_schedule(shifted)
            gradients = parallel.full_gradients() if step == 0 else {}
            trainer.step()
            if rank == 0:
                right, wanted = reference(model, shifted)
                if step == 0:
                    first = compare(loss, right, gradients, wanted)
                _reference_step(model, optimizer, wanted)
        trained = parallel.full_state_dict()
    copies = _tied_difference(dict(parallel.named_parameters()))
    expected = model.state_dict()
    differences = [
        float((trained[n] - w).norm() / w.norm()) for n, w in expected.items() if n in trained
    ]
    return Trained(max(differences, default=0.0), copies, first)


def _reference_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, gradients: dict[str, Tensor]
) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _tied_difference(parameters: dict[str, Tensor]) -> float:
    """Return how far the copies of a parameter that lives on several stages are apart."""
    sums = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in parameters.items()}
    mine = {name: value.detach().double().sum().item() for name, value in sums.items()}
    everyone: list[dict[str, float] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if "transformer.wte.weight" not in set().union(*(set(e or {}) for e in everyone)):
        return 0.0
    by_value = [(e or {}).get("transformer.wte.weight") for e in everyone]
    held = [value for value in by_value if value is not None]
    tp = len(held) // 2 or 1  # the first stage's ranks come first, the last stage's last
    return max(abs(a - b) / abs(a) for a, b in zip(held[:tp], held[-tp:], strict=True))
