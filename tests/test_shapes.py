"""`parallelize(..., shapes=[...])`: one model, batches of several shapes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilm_compile import Parallel, PlanError, parallelize, verify
from ilm_compile.errors import BatchError
from ilm_compile.runtime.evaluation import evaluate
from tests.support.world import World

VOCAB, WIDTH, HEADS = 24, 16, 2
FIRST = (2, 8)
FURTHER = [(1, 8), (2, 12), (3, 5)]  # fewer rows, longer rows, both others and odd
PLANS: dict[str, dict[str, Any]] = {
    "tp": {"tp": 2},
    "tp sequence": {"tp": 2, "sequence_parallel": True},
    "pp": {"pp": 2, "num_microbatches": 2},
    "pp recomputed": {"pp": 2, "num_microbatches": 3, "checkpoint": True},
    "dp": {"num_microbatches": 2},
    "dp zero=3": {"num_microbatches": 1, "zero": 3},
    "cp": {"cp": 2},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 32)
        self.down = nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Its positions and a constant of its own depend on the length of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.dropout = nn.Dropout(0.5)
        self.tables = {n: torch.linspace(0.5, 1.5, n).double() for n in (5, 8, 12)}

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        length = input_ids.shape[1]
        x = self.embedding(input_ids) + self.positions(torch.arange(length))
        x = x * self.tables[length][:, None]
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def make_model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def inputs(shape: tuple[int, ...]) -> dict[str, Any]:
    return {name: (shape, torch.int64) for name in ("input_ids", "labels")}


def make(**plan: Any) -> Parallel:
    further = [{"input_ids": shape, "labels": (shape, torch.int64)} for shape in FURTHER]
    return parallelize(make_model(), example_inputs=inputs(FIRST), shapes=further, **plan)


def batch_of(shape: tuple[int, int], num_slices: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    size = (shape[0] * num_slices, shape[1])
    ids, labels = (torch.randint(VOCAB, size, generator=generator) for _ in range(2))
    labels[0, ::2] = -100
    return {"input_ids": ids, "labels": labels}


def train_all(rank: int, plan: dict[str, Any]) -> list[tuple[float, dict[str, Tensor]]]:
    """The loss and the gradients of a batch of each shape, the first one's twice."""
    parallel = make(**plan)
    num_slices = parallel.step_inputs.layout.num_slices
    found = []
    for shape in (FIRST, *FURTHER, FIRST):
        parallel.zero_grad()
        loss = parallel.execute_schedule(batch_of(shape, num_slices))
        assert isinstance(loss, Tensor)
        found.append((loss.item(), parallel.full_gradients()))
    return [(loss, grads) for loss, grads in found] + [(num_slices, {})]


@pytest.mark.parametrize("name", PLANS)
def test_losses_and_gradients_of_every_shape_are_the_models(name: str, world2: World) -> None:
    *found, (num_slices, _) = world2.run(train_all, PLANS[name])[0]
    for shape, (loss, gradients) in zip((FIRST, *FURTHER, FIRST), found, strict=True):
        model = make_model()
        expected = model(**batch_of(shape, int(num_slices)))["loss"]
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-10), shape
        for path, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[path], parameter.grad, rtol=1e-10, atol=1e-12)


def switch_all(rank: int) -> dict[str, Any]:
    """What evaluation, modes and refusals do with several shapes."""
    parallel = make(tp=2)
    shapes = [(2, 12), FIRST, (2, 12)]
    metrics = evaluate(parallel, [batch_of(shape, 1) for shape in shapes])
    told = {}
    for name, shape in {"unknown": (2, 9), "rows": (4, 8)}.items():
        with pytest.raises(BatchError) as error:
            parallel.execute_schedule(batch_of(shape, 1))
        told[name] = str(error.value)
    outputs = parallel.execute_schedule(
        batch_of((3, 5), 1), forward_only=True, return_output_label=True
    )
    assert isinstance(outputs, tuple)
    return {**metrics, **told, "logits": outputs[0]}


def test_evaluation_and_outputs_go_from_shape_to_shape(world2: World) -> None:
    found = world2.run(switch_all)[0]
    model, count, total = make_model(), 0, 0.0
    for shape in ((2, 12), FIRST, (2, 12)):
        batch = batch_of(shape, 1)
        kept = int((batch["labels"] != -100).sum())
        total += kept * model(**batch)["loss"].item()
        count += kept
    assert found["num_tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-10)
    logits = model(**batch_of((3, 5), 1))["logits"]
    torch.testing.assert_close(found["logits"], logits.detach(), rtol=1e-10, atol=1e-12)
    for name in ("unknown", "rows"):
        assert "name its shape in parallelize(..., shapes=[...])" in found[name]


class Dropping(Model):
    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.dropout(self.embedding(input_ids))
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def test_dropout_is_off_in_evaluation_whenever_a_shape_is_compiled() -> None:
    torch.manual_seed(0)
    model = Dropping().double()
    both = [inputs((1, 8)), inputs((2, 12))]
    parallel = parallelize(model, example_inputs=inputs(FIRST), shapes=both)
    early, late = batch_of((1, 8), 1), batch_of((2, 12), 1)
    dropped = parallel.execute_schedule(early)
    parallel.eval()
    off = [parallel.execute_schedule(batch, forward_only=True) for batch in (early, late)]
    parallel.train()
    again = parallel.execute_schedule(late)
    model.eval()
    with torch.no_grad():
        expected = [model(**batch)["loss"] for batch in (early, late)]
    assert [float(loss) for loss in off] == pytest.approx([float(e) for e in expected], rel=1e-10)
    assert dropped != pytest.approx(expected[0])
    assert again != pytest.approx(expected[1])


def test_a_shape_is_compiled_when_its_first_batch_comes_and_once() -> None:
    traced: list[int] = []

    class Counted(Model):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            traced.append(input_ids.shape[1])
            return super().forward(input_ids, labels)

    model = Counted().double()
    parallel = parallelize(model, example_inputs=inputs(FIRST), shapes=[inputs((2, 12))])
    assert set(traced) == {8}
    for shape in ((2, 12), FIRST, (2, 12)):
        traced.clear()
        parallel.execute_schedule(batch_of(shape, 1))
        assert set(traced) <= {12}
    assert traced == []


WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "names": ([{"input_ids": (1, 8)}], r"shapes\[0\]: expected a shape for each input .*labels"),
    "twice": ([inputs((1, 8)), inputs((1, 8))], r"shapes\[1\]: .* is given twice"),
    "first": ([inputs(FIRST)], "is given twice"),
    "dims": ([inputs((8,))], r"shapes\[0\]: input_ids: expected 2 sizes above 0"),
    "dtype": (
        [{"input_ids": ((1, 8), torch.int32), "labels": (1, 8)}],
        "torch.int64, as in .*torch.int32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_shapes_that_cannot_be_are_refused_before_any_work(name: str) -> None:
    shapes, message = WRONG[name]
    with pytest.raises(PlanError, match=message):
        parallelize(make_model(), example_inputs=inputs(FIRST), shapes=shapes)


class Branching(Model):
    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        if input_ids.shape[1] > 8:
            x = x + self.positions(torch.arange(input_ids.shape[1]))
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def test_a_model_that_uses_other_parameters_for_a_shape_is_refused() -> None:
    parallel = parallelize(
        Branching().double(), example_inputs=inputs(FIRST), shapes=[inputs((2, 12))]
    )
    with pytest.raises(PlanError, match=r"not made like that of the first one, in .*positions"):
        parallel.execute_schedule(batch_of((2, 12), 1))


def test_every_shape_is_proven() -> None:
    further = [{"input_ids": s, "labels": s} for s in FURTHER[:2]]
    report = verify(make_model(), example_inputs=inputs(FIRST), shapes=further, tp=2, pp=2, dp=2)
    report.raise_if_failed()
    names = [check.name for check in report.checks]
    for shape in FURTHER[:2]:
        assert f"step of input_ids {shape}, labels {shape}" in names
    assert report.max_grad_error < 1e-10


def test_the_proof_finds_the_shape_that_goes_another_way() -> None:
    report = verify(
        Branching().double(), example_inputs=inputs(FIRST), shapes=[inputs((2, 12))], tp=2
    )
    assert [check.name for check in report.checks if not check.ok] == [
        "types of input_ids (2, 12), labels (2, 12)"
    ]
