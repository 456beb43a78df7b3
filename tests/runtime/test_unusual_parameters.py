"""Scalars, several dtypes and frozen parts, in real processes: the same training as on one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ilm_compile
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.checkpoint import CheckpointManager
from tests.support.world import World

VOCAB, HIDDEN, SEQ, ROWS, LR, MAX_NORM, STEPS = 12, 8, 4, 2, 1e-2, 0.1, 3


class Model(nn.Module):
    """Two embeddings and four layers, each with a norm and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(4))
        self.gains = nn.ParameterList(nn.Parameter(torch.tensor(0.5 + i)) for i in range(4))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.register_buffer("shift", torch.linspace(0, 1, HIDDEN))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.shift
        for layer, norm, gain in zip(self.layers, self.norms, self.gains, strict=True):
            y = norm(torch.tanh(layer(x.to(layer.weight.dtype))).to(norm.weight.dtype))
            x = x + (gain * y).to(x.dtype)
        logits = self.head(x.to(self.head.weight.dtype))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class Case:
    """plan; frozen: prefixes of names; float32: of those in another dtype than float64."""

    plan: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.float32 else 1e-9

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = Model().double()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(self.frozen or ("none",)))
            if name.startswith(self.float32 or ("none",)):
                parameter.data = parameter.data.float()
        return model


STAGE = ("embed", "layers.0", "layers.1", "norms.0", "norms.1", "gains.0", "gains.1")
CASES = {
    "scalars": Case({"num_microbatches": 2}),
    "scalars, zero 3": Case({"num_microbatches": 2, "zero": 3}),
    "dtypes": Case({"num_microbatches": 2}, float32=("norms", "layers.1")),
    "dtypes, zero 3": Case({"num_microbatches": 2, "zero": 3}, float32=("norms", "gains.2")),
    "dtypes, pipeline": Case({"pp": 2, "num_microbatches": 2}, float32=("norms",)),
    "dtypes, tensor parallel": Case({"tp": 2, "num_microbatches": 2}, float32=("norms",)),
    "frozen embedding": Case({"num_microbatches": 2}, ("embed",)),
    "frozen layers, zero 3": Case({"zero": 3}, ("layers.0", "layers.2", "gains")),
    "frozen region": Case({}, ("layers.1", "norms.1", "gains.1")),
    "frozen stage": Case({"pp": 2, "num_microbatches": 2}, STAGE),
    "frozen in another dtype": Case({"zero": 3}, ("norms",), float32=("norms",)),
}


def make_batch(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(VOCAB, (rows, SEQ), generator=generator) for _ in range(2))
    return {"input_ids": ids, "labels": labels.masked_fill(torch.arange(rows)[:, None] == 1, -100)}


def parallel_of(case: Case) -> ilm_compile.runtime.Parallel:
    inputs = {name: ((ROWS, SEQ), torch.int64) for name in ("input_ids", "labels")}
    return ilm_compile.parallelize(case.model(), example_inputs=inputs, **case.plan)


def train(rank: int, case: Case, folder: str) -> dict[str, Any]:
    """Steps with a checkpoint after the first, put into new weights; losses, weights and norms."""
    parallel = parallel_of(case)
    trainer = ilm_compile.Trainer(parallel, lr=LR, max_grad_norm=MAX_NORM)
    rows = ROWS * parallel.plan.num_microbatches * parallel.mesh.dp.size
    losses, norms = [], []
    for step in range(STEPS):
        trainer.zero_grad()
        loss = trainer.execute_schedule(make_batch(rows, step))
        assert isinstance(loss, Tensor)
        losses.append(loss.item())
        norms.append(trainer.step())
        manager = CheckpointManager(f"{folder}/ckpt", parallel, optimizer=trainer.optimizer)
        if step == 0:
            manager.save(1, wait=True)
            spoil(parallel)
            trainer.optimizer.state.clear()
            manager.load(1, ["model", "optimizer"])
        manager.close()
    return {"losses": losses, "norms": norms, "state": parallel.full_state_dict(), "rows": rows}


def spoil(parallel: ilm_compile.runtime.Parallel) -> None:
    with torch.no_grad():
        for shard in parallel.parameters.shards.values():
            if shard.variable.is_parameter or shard.variable.persistent:
                shard.local.fill_(torch.nan)


def train_alone(case: Case, rows: int) -> dict[str, Any]:
    model = case.model()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**make_batch(rows, step))
        loss.backward()
        losses.append(loss.item())
        gradients = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
        norms.append(torch.stack(gradients).norm().item())
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    return {"losses": losses, "norms": norms, "state": model.state_dict()}


def check(world: World, case: Case, folder: Path) -> None:
    first, *others = world.run(train, case, str(folder))
    expected = train_alone(case, first["rows"])
    for result in (first, *others):
        assert result["losses"] == pytest.approx(expected["losses"], rel=case.tolerance)
        assert result["norms"] == pytest.approx(expected["norms"], rel=case.tolerance)
    assert first["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        found = first["state"][name]
        assert found.dtype == value.dtype
        torch.testing.assert_close(
            found.double(), value.double(), rtol=10 * case.tolerance, atol=1e-5 * case.tolerance
        )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_in_four_processes_is_that_in_one(
    world4: World, case: Case, tmp_path: Path
) -> None:
    check(world4, case, tmp_path)


def load_after_a_step(rank: int, case: Case) -> tuple[float, float]:
    """The loss of a batch after a step, and after all weights were set to half."""
    parallel = parallel_of(case)
    batch = make_batch(ROWS * parallel.plan.num_microbatches * parallel.mesh.dp.size, 0)
    first = parallel.execute_schedule(batch)
    state = {name: value / 2 for name, value in parallel.full_state_dict().items()}
    parallel.load_state_dict(state)
    second = parallel.execute_schedule(batch)
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    return first.item(), second.item()


@pytest.mark.parametrize("frozen", [STAGE, ("embed", *STAGE[1:], "head")], ids=["stage", "more"])
def test_frozen_weights_that_are_loaded_are_what_computes(
    world4: World, frozen: tuple[str, ...]
) -> None:
    case = Case({"pp": 2, "num_microbatches": 2, "zero": 1}, frozen)
    model, batch = case.model(), make_batch(ROWS * 4, 0)
    expected = [model(**batch).item()]
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.div_(2)
    expected.append(model(**batch).item())
    for losses in world4.run(load_after_a_step, case):
        assert losses == pytest.approx(expected, rel=case.tolerance)


def train_nothing(rank: int) -> str:
    parallel = parallel_of(Case({"pp": 2}, ("",)))
    try:
        ilm_compile.Trainer(parallel)
    except IlmCompileError as error:
        return str(error)
    return ""


def test_a_model_that_is_frozen_everywhere_is_refused_on_every_rank(world4: World) -> None:
    for text in world4.run(train_nothing):
        assert "Trainer: expected at least one parameter with requires_grad, got none on" in text
