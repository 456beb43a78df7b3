"""The loss is normalised by the targets of the whole batch, whatever its micro-batches hold."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ilm_compile.program.program import Count, Program
from ilm_compile.program.trace import trace
from tests.program.execute import Result, assert_same, run_model

aten = torch.ops.aten
CLASSES, WIDTH, ROWS, SEQ, MICRO_BATCHES = 5, 4, 8, 3, 4
Loss = Callable[[Tensor, Tensor], Tensor]


class Tagger(nn.Module):
    """Class scores of every position, and any loss of them."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
        self.register_buffer("weight", torch.linspace(1, 2, CLASSES, dtype=torch.float64))
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.head(x), labels)


def batch(ignored: int = -100) -> dict[str, Tensor]:
    """Eight rows; the first has no target at all, later ones have more and more."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (ROWS, SEQ), generator=generator)
    for row in range(ROWS):
        labels[row, : SEQ - row // 2] = ignored
    x = torch.randn(ROWS, SEQ, WIDTH, dtype=torch.float64, generator=generator)
    return {"x": x, "labels": labels}


INPUTS = {
    "x": ((ROWS // MICRO_BATCHES, SEQ, WIDTH), torch.float64),
    "labels": ((ROWS // MICRO_BATCHES, SEQ), torch.int64),
}


def count_targets(count: Count, part: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = count.graph(*(part[name] for name in count.inputs))
    return result.double()


def run_in_micro_batches(program: Program, model: nn.Module, whole: Mapping[str, Tensor]) -> Result:
    """The average loss of the micro-batches and its gradients, as the runtime takes them."""
    chunks = [value.chunk(MICRO_BATCHES) for value in whole.values()]
    parts = [dict(zip(whole, part, strict=True)) for part in zip(*chunks, strict=True)]
    counts = {
        name: sum(count_targets(count, part) for part in parts) / MICRO_BATCHES
        for name, count in program.target_counts.items()
    }
    names = [str(node.target) for node in program.graph.find_nodes(op="placeholder")]
    variables = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    used = {name: variables[name] for name in program.graph_module.state_dict()}
    losses = [
        functional_call(program.graph_module, used, tuple({**part, **counts}[n] for n in names))[0]
        for part in parts
    ]
    loss = torch.stack(losses).mean()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {"loss": loss}, dict(zip(parameters, gradients, strict=True))


def flat(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return scores.flatten(0, 1), labels.flatten()


def shifted(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores[:, :-1].reshape(-1, CLASSES), labels[:, 1:].reshape(-1))


MEANS: dict[str, Loss] = {
    "mean": lambda s, t: F.cross_entropy(*flat(s, t)),
    "mean, positional": lambda s, t: aten.cross_entropy_loss(*flat(s, t), None, 1),
    "label smoothing": lambda s, t: F.cross_entropy(*flat(s, t), label_smoothing=0.1),
    "other ignore_index": lambda s, t: F.cross_entropy(
        *flat(s, t.masked_fill(t == -100, 2)), ignore_index=2
    ),
    "classes in dim 1": lambda s, t: F.cross_entropy(s.transpose(1, 2), t),
    "shifted in the model": shifted,
    "times a factor": lambda s, t: 0.5 * F.cross_entropy(*flat(s, t)),
    "two heads, other targets": lambda s, t: F.cross_entropy(*flat(s, t)) + 2 * shifted(s, t),
}


@pytest.mark.parametrize("loss", MEANS.values(), ids=MEANS)
def test_average_of_unequal_micro_batches_is_the_loss_of_the_batch(loss: Loss) -> None:
    model, whole = Tagger(loss), batch()
    program = trace(model, example_inputs=INPUTS)
    assert_same(run_in_micro_batches(program, model, whole), run_model(model, whole))


class Weighted(Tagger):
    """Class weights: the mean is over the weights, not the targets."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scores, targets = flat(self.head(x), labels)
        smoothed = F.cross_entropy(scores, targets, weight=self.weight, label_smoothing=0.1)
        return smoothed + F.nll_loss(2 * scores.log_softmax(-1), targets, weight=self.weight)


def test_class_weights_are_those_of_the_targets_of_the_batch() -> None:
    model, whole = Weighted(MEANS["mean"]), batch()
    program = trace(model, example_inputs=INPUTS)
    assert_same(run_in_micro_batches(program, model, whole), run_model(model, whole))
    assert [n.meta["val"].shape for n in program.graph.nodes if n.name == "num_targets"] == [(5,)]


def test_nll_loss_of_log_softmax_is_a_cross_entropy() -> None:
    def loss(s: Tensor, t: Tensor) -> Tensor:
        scores, targets = flat(s, t)
        return F.nll_loss(F.log_softmax(scores, 1), targets, ignore_index=3)

    ours, theirs = (
        trace(Tagger(each), example_inputs=INPUTS)
        for each in (loss, lambda s, t: F.cross_entropy(*flat(s, t), ignore_index=3))
    )
    assert [n.target for n in ours.calls()] == [n.target for n in theirs.calls()]
    assert [n.args[2:] for n in ours.calls()][-2] == [n.args[2:] for n in theirs.calls()][-2]


@pytest.mark.parametrize(
    "change",
    [lambda s: s.log_softmax(0), lambda s: s.log_softmax(1, dtype=torch.float32), torch.sin],
    ids=["over rows", "rounded", "something else"],
)
def test_nll_loss_of_anything_else_stays_one(change: Callable[[Tensor], Tensor]) -> None:
    program = trace(
        Tagger(lambda s, t: F.nll_loss(change(s.flatten(0, 1)), t.flatten())),
        example_inputs=INPUTS,
    )
    (node,) = program.graph.find_nodes(op="call_function", target=aten.nll_loss_nd.default)
    assert node.args[3] == 2
    assert list(program.target_counts) == ["num_targets"]


def test_term_beside_the_cross_entropy_is_averaged() -> None:
    model = Tagger(lambda s, t: F.cross_entropy(*flat(s, t)) + s.square().mean())
    whole = batch()
    program = trace(model, example_inputs=INPUTS)
    assert_same(run_in_micro_batches(program, model, whole), run_model(model, whole))


def probabilities(scores: Tensor, labels: Tensor) -> Tensor:
    target = torch.full((*labels.shape, CLASSES), 1 / CLASSES, device=scores.device).double()
    return F.cross_entropy(scores.flatten(0, 1), target.flatten(0, 1))


UNTOUCHED: dict[str, Callable[[], Tagger]] = {
    "sum": lambda: Tagger(lambda s, t: F.cross_entropy(*flat(s, t), reduction="sum")),
    "probabilities as targets": lambda: Tagger(probabilities),
    "targets from parameters": lambda: Tagger(
        lambda s, t: F.cross_entropy(s.flatten(0, 1), s.detach().flatten(0, 1).argmax(-1))
    ),
    "no cross entropy": lambda: Tagger(lambda s, t: s.square().mean()),
}


@pytest.mark.parametrize("make", UNTOUCHED.values(), ids=UNTOUCHED)
def test_other_losses_are_left_alone(make: Callable[[], Tagger]) -> None:
    program = trace(make(), example_inputs=INPUTS)
    assert program.target_counts == {}
    assert [str(n.target) for n in program.graph.find_nodes(op="placeholder")] == ["x", "labels"]
    assert not program.graph.find_nodes(op="call_function", target=aten.div.Tensor)


def test_probabilities_keep_their_meaning_in_micro_batches() -> None:
    model, whole = Tagger(probabilities), batch()
    program = trace(model, example_inputs=INPUTS)
    assert_same(run_in_micro_batches(program, model, whole), run_model(model, whole))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (MEANS["mean"], [4]),
        (MEANS["shifted in the model"], [3]),
        (lambda s, t: F.cross_entropy(*flat(s, t), ignore_index=-1), [6]),
        (MEANS["two heads, other targets"], [4, 3]),
    ],
    ids=["every position", "shifted", "nothing ignored", "two"],
)
def test_targets_are_counted(loss: Loss, expected: list[int]) -> None:
    program = trace(Tagger(loss), example_inputs=INPUTS)
    part = {"labels": torch.tensor([[1, 0, 2], [-100, -100, 4]])}
    counts = [count_targets(count, part) for count in program.target_counts.values()]
    assert counts == expected


def test_counts_need_only_the_inputs_they_use() -> None:
    (count,) = trace(Tagger(shifted), example_inputs=INPUTS).target_counts.values()
    assert count.inputs == ("labels",)


def test_each_cross_entropy_has_its_own_count() -> None:
    program = trace(Tagger(MEANS["two heads, other targets"]), example_inputs=INPUTS)
    assert list(program.target_counts) == ["num_targets", "num_targets_1"]
    placeholders = [str(n.target) for n in program.graph.find_nodes(op="placeholder")]
    assert placeholders == ["x", "labels", "num_targets", "num_targets_1"]


def test_logits_are_exposed_when_only_the_loss_is_returned() -> None:
    program = trace(Tagger(MEANS["mean"]), example_inputs=INPUTS)
    (loss,) = program.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default)
    assert program.output_names == ("loss", "logits")
    assert program.outputs[1] is loss.args[0]


class TellsMore(Tagger):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        scores = self.head(x)
        return {"loss": F.cross_entropy(*flat(scores, labels)), "mean": scores.mean()}


def test_logits_are_not_exposed_beside_other_outputs() -> None:
    assert trace(TellsMore(MEANS["mean"]), example_inputs=INPUTS).output_names == ("loss", "mean")


def test_loss_without_cross_entropy_exposes_nothing() -> None:
    program = trace(Tagger(lambda s, t: s.square().mean()), example_inputs=INPUTS)
    assert program.output_names == ("loss",)
