"""A model is traced as people write it, without a copy, and is afterwards what it was."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ilm_compile import partition
from ilm_compile.errors import TraceError
from ilm_compile.program.trace import trace
from tests.program.training import LM, SEQ, VOCAB, WIDTH, assert_trains_equal, tokens


class NotCopied:
    """What copy.deepcopy would stumble over."""

    def __deepcopy__(self, memo):
        raise TypeError("this cannot be copied")

    def __init__(self):
        self.table = None
        self.calls = []


class LeavesBehind(LM):
    """Keeps its loss, tables and a log, in attributes of every kind."""

    def __init__(self):
        super().__init__()
        self.last, self.cache, self.log = None, {}, []
        self.helper = NotCopied()
        self.seen = set()
        self.register_buffer("table", torch.ones(WIDTH, dtype=torch.float64), persistent=False)

    def mix(self, h):
        if SEQ not in self.cache:
            self.cache[SEQ] = torch.arange(h.shape[1], device=h.device)[:, None] * 0.1
        self.log.append(h)
        self.seen.add(h.shape)
        self.helper.table = self.last = out = self.layer(h) + self.cache[SEQ]
        self.table = self.cache[SEQ][0].expand(WIDTH).to(h.dtype)
        return out * (1 + self.table)


def test_attributes_are_put_back():
    model = LeavesBehind()
    table = model.table
    trace(model, example_inputs=tokens())
    assert (model.last, model.cache, model.log, model.seen) == (None, {}, [], set())
    assert model.helper.table is None
    assert model.table is table
    assert not hasattr(model.table, "fake_mode")
    assert_trains_equal(model)


def test_a_model_that_has_run_is_traced():
    model = LeavesBehind()
    model(**tokens())
    left = model.last
    assert_trains_equal(model)
    assert model.last is not None
    assert left.grad_fn is not None


def test_weights_are_the_same_objects():
    model = LeavesBehind().requires_grad_(True)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    trace(model, example_inputs=tokens())
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before


def test_attributes_are_put_back_when_the_model_is_refused():
    model = LM(lambda m, h: h if h.sum() > 0 else m.layer(h))
    weight = model.layer.weight
    with pytest.raises(TraceError):
        trace(model.eval(), example_inputs=tokens())
    assert model.layer.weight is weight
    assert not model.training


class Closures(LM):
    """Functions made in __init__ over the model, a layer and a weight; a list of a weight."""

    def __init__(self):
        super().__init__()
        weight = self.layer.weight
        self.mlp = lambda h: self.layer(h).relu()
        self.again = lambda h: h @ weight
        self.weights = [self.layer.bias]

    def mix(self, h):
        return self.again(self.mlp(h)) + self.weights[0]


class Tied(LM):
    """Logits through a function over the embedding."""

    def __init__(self):
        super().__init__()
        self.head = nn.Identity()
        self.logits = lambda h: h @ self.embed.weight.t()

    def mix(self, h):
        return self.logits(self.layer(h))


def weighted(outputs, labels):
    weight = torch.linspace(1, 2, VOCAB, dtype=torch.float64)
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), weight)


class Logits(LM):
    """Returns its logits alone."""

    def forward(self, input_ids):
        return self.head(self.mix(self.embed(input_ids)))


def repeated(m, h):
    for _ in range(3):
        h = h + m.layer(h).tanh()
    return h


WRITTEN = {
    "closures": Closures,
    "tied logits": Tied,
    "a block applied several times": lambda: LM(repeated),
}


@pytest.mark.parametrize("make", WRITTEN.values(), ids=WRITTEN)
def test_trains_as_in_pytorch(make):
    assert_trains_equal(make())


WEIGHTS = torch.linspace(1, 2, VOCAB, dtype=torch.float64)


@pytest.mark.parametrize(
    "loss_fn",
    [weighted, lambda o, t: nn.CrossEntropyLoss(WEIGHTS)(o.flatten(0, 1), t.flatten())],
    ids=["made in the loss", "a module"],
)
def test_weighted_loss(loss_fn):
    assert_trains_equal(Logits(), num_microbatches=1, loss_fn=loss_fn)


class Scaled(nn.Module):
    """A loss with a tensor of its own."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, outputs, labels):
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten()) * self.scale


def test_a_loss_that_is_a_module_keeps_its_buffers():
    loss_fn = Scaled(torch.tensor(0.5, dtype=torch.float64))
    assert_trains_equal(Logits(), num_microbatches=1, loss_fn=loss_fn)


def test_a_loss_with_a_parameter_is_refused():
    loss_fn = Scaled(nn.Parameter(torch.tensor(0.5)))
    with pytest.raises(TraceError, match="has a gradient but is no parameter of the model"):
        trace(Logits(), example_inputs=tokens(), loss_fn=loss_fn)


def test_a_repeated_block_is_partitioned():
    rows = {name: value[:2] for name, value in tokens().items()}
    program = partition(LM(repeated), example_inputs=rows, pp=2, num_microbatches=2)
    assert len({node.meta["stage"] for node in program.calls() if "stage" in node.meta}) == 2


@dataclasses.dataclass
class Output:
    """What some models return."""

    loss: torch.Tensor
    logits: torch.Tensor | None = None


Named = collections.namedtuple("Named", ["logits", "loss"])


class Plain:
    """An object with a loss, of no particular kind."""

    def __init__(self, loss, logits):
        self.loss, self.logits = loss, logits


class Slotted:
    """One that has no dictionary of what it holds, and computes its loss when asked."""

    __slots__ = ("parts",)

    def __init__(self, loss, logits):
        self.parts = (loss, logits)

    @property
    def loss(self):
        return self.parts[0]


@dataclasses.dataclass
class Halves:
    """A dataclass whose loss is no field."""

    half: torch.Tensor
    logits: torch.Tensor

    @property
    def loss(self):
        return 2 * self.half


@pytest.mark.parametrize(
    "form",
    [Output, lambda loss, logits: Named(logits, loss), Plain],
    ids=["dataclass", "namedtuple", "plain"],
)
def test_outputs_with_a_loss(form):
    class Returns(LM):
        def forward(self, input_ids, labels):
            logits = self.head(self.embed(input_ids))
            return form(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)

    assert trace(Returns(), example_inputs=tokens()).output_names == ("loss", "logits")
    assert_trains_equal(Returns())


@pytest.mark.parametrize(
    "form", [Slotted, lambda loss, logits: Halves(loss / 2, logits)], ids=["slots", "dataclass"]
)
def test_outputs_whose_loss_is_a_property(form):
    class Returns(LM):
        def forward(self, input_ids, labels):
            logits = self.head(self.embed(input_ids))
            return form(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)

    assert_trains_equal(Returns())


class Counting(LM):
    """Changes a number in each forward."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def mix(self, h):
        self.calls += 1
        return self.layer(h) * self.calls


def test_a_number_that_the_forward_changes_is_warned_of():
    model = Counting()
    program = trace(model, example_inputs=tokens())
    assert program.warnings == [
        "the forward changes calls from 0 to 1; the program is traced once, with what it makes of 0"
    ]
    assert model.calls == 0


class Overwrites(LM):
    """Writes its frequencies before it reads them, as rotary embeddings do, or after."""

    def __init__(self, *, before, persistent=False):
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH, dtype=torch.float64), persistent=persistent)
        self.before = before

    def mix(self, h):
        new = torch.linspace(1, 2, WIDTH, dtype=h.dtype, device=h.device)
        if self.before:
            self.scale.copy_(new)
        h = self.layer(h) * self.scale
        if not self.before:
            self.scale.copy_(new)
        return h


def test_a_buffer_that_each_forward_makes_anew():
    assert_trains_equal(Overwrites(before=True))


@pytest.mark.parametrize("options", [{"before": False}, {"before": True, "persistent": True}])
def test_a_buffer_that_keeps_state_is_refused(options):
    with pytest.raises(TraceError, match=r"writes to the buffers \['scale'\]"):
        trace(Overwrites(**options), example_inputs=tokens())


def test_an_input_that_is_written_to_is_refused():
    def write(m, h):
        return m.layer(h)

    class Writes(LM):
        def forward(self, input_ids, labels):
            labels[:, 0] = -100
            return super().forward(input_ids, labels)

    with pytest.raises(TraceError, match="writes to the inputs"):
        trace(Writes(write), example_inputs=tokens())


def test_a_lazy_module_is_refused():
    class Lazy(LM):
        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(WIDTH)

    with pytest.raises(TraceError, match=r"layer.weight has no shape yet; run the model once"):
        trace(Lazy(), example_inputs=tokens())
