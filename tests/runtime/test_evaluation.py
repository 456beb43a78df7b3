"""Loss, perplexity and accuracy on the parallel model: those of the model on one device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ilm_compile
from ilm_compile import models
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime import Parallel
from ilm_compile.runtime.data import DummyDataset, ValidationBatches
from ilm_compile.runtime.evaluation import evaluate
from tests.support.models import randomize_
from tests.support.promote import promoted_float32
from tests.support.tiny_model import SEQ, VOCAB, TinyTransformer
from tests.support.world import World

TYPES = {"code": 0, "en": 2}
ROWS = 8  # of a global batch


class Shifted(nn.Module):
    """A model that shifts its labels itself, as Hugging Face's do, with dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyTransformer(dropout=0.5)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.body(input_ids, labels)["logits"]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class NoCrossEntropy(nn.Module):
    """A model whose loss is a mean of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyTransformer(num_blocks=2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.body(input_ids, labels)["logits"].square().mean()


def internlm2() -> nn.Module:
    # 33 classes: no tp divides them, so that the vocabulary is padded.
    return models.internlm2_tiny(num_layers=2, vocab_size=33, max_seq_len=SEQ)


def shifted() -> nn.Module:
    return Shifted()


def no_cross_entropy() -> nn.Module:
    return NoCrossEntropy()


def make(build: str) -> nn.Module:
    model = globals()[build]().double()
    return randomize_(model, seed=1)


def batches(build: str) -> list[dict[str, Tensor]]:
    """Three global batches, the last filled up with rows that have no target; types at random."""
    data = DummyDataset(num_rows=2 * ROWS + 3, seq_len=SEQ, vocab_size=VOCAB, max_documents=3)
    generator = torch.Generator().manual_seed(5)
    result = []
    for batch in ValidationBatches(data, global_batch_size=ROWS):
        batch["type_ids"] = 2 * torch.randint(2, (ROWS, SEQ), generator=generator)
        if build != "internlm2":
            del batch["position_ids"], batch["cu_seqlens"]
        result.append(batch)
    return result


def parallelize(build: str, **plan: Any) -> Parallel:
    inputs = {n: t for n, t in batches(build)[0].items() if n != "type_ids"}
    dp = 1 if not torch.distributed.is_initialized() else torch.distributed.get_world_size()
    dp //= plan.get("tp", 1) * plan.get("pp", 1)
    rows = ROWS // (plan.get("num_microbatches", 1) * dp)
    example = {name: tensor[:rows] for name, tensor in inputs.items()}
    return ilm_compile.parallelize(make(build), example_inputs=example, **plan)


def alone(build: str) -> dict[str, float]:
    """The same numbers from the logits of the whole model."""
    model = make(build).eval()
    logits, labels, kinds = [], [], []
    for batch in batches(build):
        target, types = batch.pop("labels"), batch.pop("type_ids")
        with torch.no_grad():
            if build == "internlm2":
                logits.append(model(**batch))
            else:
                logits.append(model.body(**batch, labels=target)["logits"][:, :-1])
                target, types = target[:, 1:], types[:, 1:]
        labels.append(target)
        kinds.append(types)
    z, y, t = (torch.cat(parts).flatten(0, 1) for parts in (logits, labels, kinds))
    result: dict[str, float] = {}
    for suffix, wanted in (
        ("", y != -100),
        *((f"/{n}", (y != -100) & (t == i)) for n, i in TYPES.items()),
    ):
        loss = F.cross_entropy(z[wanted], y[wanted]).item()
        result[f"loss{suffix}"], result[f"perplexity{suffix}"] = loss, math.exp(loss)
        result[f"accuracy{suffix}"] = (z[wanted].argmax(-1) == y[wanted]).double().mean().item()
        result[f"num_tokens{suffix}"] = int(wanted.sum())
    return result


def on_rank(rank: int, build: str, plan: dict[str, Any]) -> dict[str, float]:
    with promoted_float32():
        parallel = parallelize(build, **plan)
        return evaluate(parallel, batches(build), types=TYPES)


@pytest.mark.parametrize(
    ("build", "plan"),
    [
        ("internlm2", {"tp": 2, "pp": 2, "num_microbatches": 4}),
        ("internlm2", {"tp": 2, "num_microbatches": 2, "zero": 3}),
        (
            "shifted",
            {"pp": 2, "num_chunks": 2, "num_microbatches": 2, "schedule": "interleaved_1f1b"},
        ),
    ],
    ids=["tp2-pp2", "tp2-dp2-zero3", "pp2-chunks2-dp2-shifted"],
)
def test_every_rank_gets_the_numbers_of_one_device(
    world4: World, build: str, plan: dict[str, Any]
) -> None:
    with promoted_float32():
        expected = alone(build)
    assert 0 < expected["accuracy"] < 1
    for got in world4.run(on_rank, build, plan):
        assert got == pytest.approx(expected, rel=1e-10)
