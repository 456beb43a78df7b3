"""Capture: the program of a model computes what the model computes, and knows its variables."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilm_compile import models, verify
from ilm_compile.errors import TraceError
from ilm_compile.program.dropout import seeded_dropout
from ilm_compile.program.program import Input
from ilm_compile.program.trace import trace
from tests.program.execute import trace_and_compare
from tests.program.samples import FIELDS, MODELS, build
from tests.support.models import random_tokens, randomize_
from tests.support.promote import promoted_float32
from tests.support.tiny_model import SEQ, VOCAB, TinyTransformer


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_the_models(name: str) -> None:
    with promoted_float32():
        trace_and_compare(*build(name))


def test_packed_rows_too() -> None:
    model = randomize_(models.internlm2_tiny(**FIELDS).double())
    input_ids, labels = random_tokens(2, SEQ, VOCAB)
    cu_seqlens = torch.tensor([[0, 3, SEQ, SEQ], [0, 1, 5, SEQ]], dtype=torch.int32)
    batch = {"input_ids": input_ids, "labels": labels, "cu_seqlens": cu_seqlens}
    trace_and_compare(model, batch)


class Classifier(nn.Module):
    """Features and class scores of a row; `form` chooses what it returns beside the loss."""

    def __init__(self, form: str = "scores") -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8).double(), nn.Linear(8, 3).double()
        self.form = form

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        features = self.body(x).tanh()
        scores = self.head(features)
        if labels is None:
            return scores
        loss = F.cross_entropy(scores, labels)
        forms: dict[str, Any] = {
            "loss": loss,
            "tuple": (loss, scores, None, features),
            "dict": {"scores": scores, "loss": loss, "nothing": None, "number": 3},
            "vector": scores.sum(-1),
            "no loss": {"scores": scores},
        }
        return forms[self.form]


def rows() -> dict[str, Tensor]:
    return {"x": torch.randn(5, 4, dtype=torch.float64), "labels": torch.arange(5) % 3}


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("loss", ("loss", "logits")),
        ("tuple", ("loss", "output_1", "output_3")),
        ("dict", ("loss", "scores")),
    ],
)
def test_outputs_are_named_loss_first(form: str, names: tuple[str, ...]) -> None:
    program = trace(Classifier(form), example_inputs=rows())
    assert program.output_names == names
    assert [tuple(n.meta["val"].shape) for n in program.outputs[:2]] == [(), (5, 3)]


def test_loss_fn_is_traced_into_the_graph() -> None:
    program = trace_and_compare(
        Classifier(), rows(), loss_fn=lambda scores, labels: 2 * F.cross_entropy(scores, labels)
    )
    assert program.output_names == ("loss", "logits")


def test_loss_fn_may_take_a_mapping() -> None:
    def loss_fn(outputs: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())

    model, batch = build("gpt2")
    with promoted_float32():
        trace_and_compare(model, batch, loss_fn=loss_fn)


@pytest.mark.parametrize("order", [("x", "labels"), ("labels", "x")])
def test_inputs_are_placeholders_by_name_in_the_order_given(order: tuple[str, str]) -> None:
    batch = {name: rows()[name] for name in order}
    program = trace_and_compare(Classifier("loss"), batch)
    placeholders = [str(n.target) for n in program.graph.find_nodes(op="placeholder")]
    assert placeholders == [*order, "num_targets"]
    assert list(program.inputs) == list(order)


def test_inputs_are_tensors_or_shapes() -> None:
    shapes = {"x": ((5, 4), torch.float64), "labels": ((5,), torch.int64)}
    programs = [trace(Classifier("loss"), example_inputs=given) for given in (rows(), shapes)]
    assert programs[0].inputs == programs[1].inputs == {k: Input(*v) for k, v in shapes.items()}
    assert programs[0].dump() == programs[1].dump()


def test_input_that_the_model_ignores_stays_an_input() -> None:
    class Ignores(Classifier):
        def forward(self, x: Tensor, labels: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, labels)

    program = trace_and_compare(Ignores("loss"), {**rows(), "mask": torch.ones(5)})
    assert "mask" in [n.target for n in program.graph.find_nodes(op="placeholder")]


def test_example_inputs_come_from_the_model_when_not_given() -> None:
    assert trace(TinyTransformer()).inputs["input_ids"] == Input((2, SEQ), torch.int64)


def test_variables_are_the_models_parameters_and_buffers_in_order() -> None:
    model, batch = build("internlm2")
    program = trace(model, example_inputs=batch)
    expected = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    found = {name: (v.shape, v.dtype) for name, v in program.parameters().items()}
    assert list(found.items()) == list(expected.items())


def test_tied_weights_are_one_variable() -> None:
    model, batch = build("gpt2")
    program = trace(model, example_inputs=batch)
    assert program.variables["transformer.wte.weight"].aliases == ("lm_head.weight",)
    assert "lm_head.weight" not in program.variables
    targets = [n.target for n in program.graph.find_nodes(op="get_attr")]
    assert targets.count("transformer.wte.weight") == 1


class WithBuffers(nn.Module):
    """One buffer under two names, one that is not saved, a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.linear.bias.requires_grad_(False)
        table = torch.linspace(1, 2, 4, dtype=torch.float64)
        self.register_buffer("table", table)
        self.register_buffer("again", table)
        self.register_buffer("temporary", torch.full((4,), 3.0).double(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.linear(x) * self.table * self.again + self.temporary).sum()
        return out


def test_buffers_keep_their_aliases_and_persistence() -> None:
    program = trace_and_compare(WithBuffers(), {"x": torch.randn(2, 4, dtype=torch.float64)})
    kept = {
        n: (v.aliases, v.persistent) for n, v in program.variables.items() if not v.is_parameter
    }
    assert kept == {"table": (("again",), True), "temporary": ((), False)}


def test_frozen_parameters_stay_frozen() -> None:
    program = trace(WithBuffers(), example_inputs={"x": ((2, 4), torch.float64)})
    assert not program.variables["linear.bias"].requires_grad
    assert not program.graph_module.get_parameter("linear.bias").requires_grad
    assert program.graph_module.get_parameter("linear.weight").requires_grad


def test_the_model_is_left_alone() -> None:
    model, batch = build("gpt2")
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cache = model.config.use_cache
    trace(model, example_inputs=batch)
    assert not model.training
    assert model.config.use_cache == cache
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_model_on_the_meta_device_gives_the_same_program() -> None:
    real = models.internlm2_tiny(**FIELDS)
    with torch.device("meta"):
        meta = models.internlm2_tiny(**FIELDS)
    assert trace(meta).dump() == trace(real).dump()


def test_no_value_is_computed_nor_weight_copied() -> None:
    program = trace(build("internlm")[0])
    assert all(p.is_meta for p in program.graph_module.parameters())


def test_model_is_traced_in_training_mode() -> None:
    program = trace(TinyTransformer(num_blocks=1, dropout=0.1).eval())
    (dropout,) = program.graph.find_nodes(op="call_function", target=seeded_dropout)
    assert dropout.args[2] == 0.1


def test_dropout_of_nothing_is_no_node() -> None:
    program = trace(TinyTransformer(num_blocks=1, dropout=0.0))
    assert not program.graph.find_nodes(op="call_function", target=seeded_dropout)


def test_program_keeps_the_initial_values() -> None:
    model = models.internlm2_tiny(**FIELDS)
    program = trace(model)
    assert program.facts == {"traced"}
    assert program.initializer == model.initial_parameter


class Returning(Classifier):
    """Returns what `pick` makes of scores, loss and a figure that is not trained."""

    def __init__(self, pick: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__("loss")
        self.pick = (pick,)

    def forward(self, x: Tensor, targets: Tensor) -> Any:  # type: ignore[override]
        scores = super().forward(x)
        figure = (scores.argmax(-1) == targets).double().mean()
        return self.pick[0](scores, F.cross_entropy(scores, targets), figure)


@pytest.mark.parametrize(
    ("pick", "names", "taken"),
    [
        (lambda s, loss, f: (s, loss), ("output_0",), "output_1"),  # nanoGPT
        (lambda s, loss, f: (f, s, loss), ("output_0", "output_1"), "output_2"),
        (lambda s, loss, f: {"logits": s, "ce": loss, "right": f}, ("logits", "right"), "ce"),
        (lambda s, loss, f: (s, loss.detach(), loss), ("output_0", "output_1"), "output_2"),
        (lambda s, loss, f: (loss, s, loss * 2), ("output_1", "output_2"), None),
        (lambda s, loss, f: {"other": loss * 2, "loss": loss}, ("other",), None),
    ],
    ids=["tuple", "after a figure", "dict", "detached", "first", "by name"],
)
def test_the_one_scalar_that_can_be_trained_is_the_loss(
    pick: Callable[..., Any], names: tuple[str, ...], taken: str | None
) -> None:
    model = Returning(pick)
    inputs = {"x": rows()["x"], "targets": rows()["labels"]}
    program = trace(model, example_inputs=inputs)
    assert program.output_names == ("loss", *names)
    told = f"trace: {taken} of Returning is the loss, its one scalar output that can be trained"
    assert [each for each in program.decisions if " is the loss" in each] == [told] * bool(taken)
    assert verify(model, example_inputs=inputs).ok


def test_two_scalars_that_can_be_trained_are_not_guessed_among() -> None:
    inputs = {"x": rows()["x"], "targets": rows()["labels"]}
    with pytest.raises(TraceError, match=r"got output_1, output_2 of outputs .* as the first"):
        trace(Returning(lambda s, loss, f: (s, loss, loss * 2)), example_inputs=inputs)


class Asks(Classifier):
    """Looks at a value before it goes on."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        if x.sum() > 0:
            x = -x
        return super().forward(x, labels)


class Counts(Classifier):
    """Writes to a buffer."""

    def __init__(self) -> None:
        super().__init__("loss")
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        self.calls += 1
        return super().forward(x, labels)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Classifier, {}, r"Classifier has no example_inputs\(\); pass example_inputs=\{"),
        (
            lambda: Classifier("vector"),
            {"example_inputs": rows()},
            r"expected the model to return a scalar loss.*got outputs \{'loss': \(5,\)\}",
        ),
        (
            lambda: Classifier("no loss"),
            {"example_inputs": rows()},
            r"expected the model to return a scalar loss.*\{'scores': \(5, 3\)\}; give what makes",
        ),
        (
            Classifier,
            {"example_inputs": rows(), "loss_fn": lambda outputs, labels: outputs},
            r"or loss_fn to return one, got outputs \{'loss': \(5, 3\)\}",
        ),
        (
            Classifier,
            {"example_inputs": {"x": rows()["x"]}, "loss_fn": F.cross_entropy},
            r"expected labels among the example_inputs, got \['x'\]",
        ),
        (
            Classifier,
            {"example_inputs": {"x": ((5, 4), torch.float64), "labels": ((4,), torch.int64)}},
            r"dimension 0 of every .* micro-batch size, got \{'x': \(5, 4\), 'labels': \(4,\)\}",
        ),
        (
            Classifier,
            {"example_inputs": {"x": ((5, 4), torch.float64), "labels": ((), torch.int64)}},
            "dimension 0 of every example input must be the micro-batch size",
        ),
        (
            lambda: Asks("loss"),
            {"example_inputs": rows()},
            r"Asks cannot be captured .* \(at .*test_trace.py:\d+: if x.sum\(\) > 0:\)",
        ),
        (Counts, {"example_inputs": rows()}, r"writes to the buffers \['calls'\]"),
    ],
    ids=[
        "no example inputs",
        "loss not scalar",
        "no loss",
        "loss_fn not scalar",
        "loss_fn without labels",
        "batch sizes differ",
        "an input without rows",
        "branch on a value",
        "buffer written",
    ],
)
def test_refused(make: Callable[[], nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(make(), **options)


def test_refusal_keeps_the_reason_of_export() -> None:
    with pytest.raises(TraceError) as info:
        trace(Asks("loss"), example_inputs=rows())
    assert info.value.__cause__ is not None
