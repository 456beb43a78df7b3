"""Loss, perplexity and accuracy on the parallel model: those of the model on one device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ilm_compile
from ilm_compile import models
from ilm_compile.errors import IlmCompileError
from ilm_compile.program.token_metrics import token_metrics
from ilm_compile.runtime import Parallel
from ilm_compile.runtime.communicator import communicator_over
from ilm_compile.runtime.data import DummyDataset, ValidationBatches
from ilm_compile.runtime.evaluation import evaluate
from tests.support.models import randomize_
from tests.support.promote import promoted_float32
from tests.support.tiny_model import SEQ, VOCAB, TinyTransformer
from tests.support.world import World

TYPES = {"code": 0, "en": 2}
ROWS = 8  # of a global batch


class Shifted(nn.Module):
    """A model that shifts its labels itself, as Hugging Face's do.

    smoothing: with a vocabulary that tp does not divide, it keeps the logits from being sharded by
    vocabulary; under sequence parallelism every rank then has tokens of its own.
    """

    def __init__(self, *, dropout: float = 0.0, smoothing: float = 0.0) -> None:
        super().__init__()
        self.body = TinyTransformer(vocab=33, dropout=dropout)
        self.smoothing = smoothing

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.body(input_ids, labels)["logits"]
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=self.smoothing
        )


class NoCrossEntropy(nn.Module):
    """A model whose loss is a mean of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyTransformer(num_blocks=2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.body(input_ids, labels)["logits"].square().mean()


class Probabilities(nn.Module):
    """A model whose targets are probabilities of the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyTransformer(num_blocks=2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.body(input_ids, labels)["logits"]
        return F.cross_entropy(logits.flatten(0, 1), logits.detach().flatten(0, 1).softmax(-1))


def internlm2() -> nn.Module:
    # 33 classes: no tp divides them, so that the vocabulary is padded.
    return models.internlm2_tiny(num_layers=2, vocab_size=33, max_seq_len=SEQ)


def dropping() -> nn.Module:
    return Shifted(dropout=0.5)


def smoothed() -> nn.Module:
    return Shifted(smoothing=0.1)


def probabilities() -> nn.Module:
    return Probabilities()


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
    dp = 1 if not dist.is_initialized() else dist.get_world_size()
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


def on_rank(rank: int, build: str, plan: dict[str, Any]) -> list[dict[str, float]]:
    """The numbers of global batches, and of this rank's rows of them alone."""
    with promoted_float32():
        parallel = parallelize(build, **plan)
        dp = parallel.mesh.dp
        own = [
            {name: value.chunk(dp.size)[dp.rank] for name, value in batch.items()}
            for batch in batches(build)
        ]
        return [
            evaluate(parallel, batches(build), types=TYPES),
            evaluate(parallel, own, types=TYPES, batch_is_local=True),
        ]


PLANS = {
    "tp2-pp2": ("internlm2", {"tp": 2, "pp": 2, "num_microbatches": 4}),
    "tp2-dp2-zero3": ("internlm2", {"tp": 2, "num_microbatches": 2, "zero": 3}),
    "pp2-chunks2-dp2": (
        "dropping",
        {"pp": 2, "num_chunks": 2, "num_microbatches": 2, "schedule": "interleaved_1f1b"},
    ),
    "tp2-dp2-by-token": ("smoothed", {"tp": 2, "num_microbatches": 2, "sequence_parallel": True}),
}


@pytest.mark.parametrize(("build", "plan"), PLANS.values(), ids=PLANS)
def test_every_rank_gets_the_numbers_of_one_device(
    world4: World, build: str, plan: dict[str, Any]
) -> None:
    with promoted_float32():
        expected = alone(build)
    assert 0 < expected["accuracy"] < 1
    for whole, own in world4.run(on_rank, build, plan):
        assert whole == pytest.approx(expected, rel=1e-10)
        assert own == whole


def test_an_evaluation_leaves_the_training_as_it_was() -> None:
    def losses(*, evaluated: bool) -> list[float]:
        parallel = parallelize("dropping", num_microbatches=2)
        found = []
        for batch in batches("dropping")[:2]:
            if evaluated:
                evaluate(parallel, batches("dropping")[1:])
            loss = parallel.execute_schedule({n: batch[n] for n in ("input_ids", "labels")})
            assert isinstance(loss, Tensor)
            found.append(loss.item())
        return found

    assert losses(evaluated=True) == losses(evaluated=False)


def test_a_batch_without_targets_is_passed_over() -> None:
    parallel = parallelize("smoothed", num_microbatches=2)
    data = batches("smoothed")
    empty = {**data[0], "labels": torch.full_like(data[0]["labels"], -100)}
    assert evaluate(parallel, [empty, *data]) == evaluate(parallel, data)


def refusal(build: str, data: list[dict[str, Tensor]], **options: Any) -> str:
    with pytest.raises(IlmCompileError) as error:
        evaluate(parallelize(build, num_microbatches=2), data, **options)
    return str(error.value)


@pytest.mark.parametrize("build", ["no_cross_entropy", "probabilities"])
def test_a_loss_that_is_no_cross_entropy_of_classes_is_refused(build: str) -> None:
    message = "expected a model whose loss is a cross entropy of class numbers"
    assert message in refusal(build, batches(build))


def test_no_batch_is_refused() -> None:
    assert "got no target at all" in refusal("smoothed", [])


def test_types_that_the_batches_do_not_have_are_refused() -> None:
    data = batches("smoothed")
    assert "numbers from 0 to 2" in refusal("smoothed", data, types={"code": 0})
    for batch in data:
        del batch["type_ids"]
    assert "expected type_ids in every batch, got input_ids, labels" in refusal(
        "smoothed", data, types=TYPES
    )


def test_of_equal_logits_the_first_counts() -> None:
    metrics = token_metrics(
        torch.zeros(3, 4), torch.tensor([0, 1, -100]), ignore_index=-100, comm=None
    )
    assert metrics.hits.tolist() == [True, False, False]
    assert metrics.losses.tolist() == pytest.approx([math.log(4), math.log(4), 0])


def equal_logits(rank: int) -> list[bool]:
    comm = communicator_over(dist.group.WORLD)
    target = torch.tensor([0, 2, 3])  # each rank has one class
    return token_metrics(torch.zeros(3, 1), target, ignore_index=-100, comm=comm).hits.tolist()


def test_of_equal_logits_on_several_ranks_the_first_counts(world4: World) -> None:
    assert world4.run(equal_logits) == [[True, False, False]] * 4
