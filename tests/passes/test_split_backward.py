"""Which products leave their weight gradient, and what becomes of them in a stage."""

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ilm_compile
from ilm_compile.ops import spec_of
from ilm_compile.ops.products import leaving_weight
from ilm_compile.passes import lower
from ilm_compile.program.weight_parts import WeightParts

WIDTH = 4
SHAPE = (3, WIDTH, WIDTH)


class Model(nn.Module):
    """Two blocks; `block` makes one of them."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


class Viewed(nn.Module):
    """Its weight is made of two parameters by ops that keep nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.randn(2, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat([self.one, self.two]).t()


class Scaled(Viewed):
    """A product of parameters keeps both for its backward."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (torch.cat([self.one, self.one]) * self.two.repeat(2, 1))


class Frozen(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.inner.weight.requires_grad_(False)


class NoWeight(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x @ x.transpose(-1, -2))


def compiled(model: nn.Module, schedule: str = "zb_h1") -> ilm_compile.Program:
    return ilm_compile.partition(
        model,
        example_inputs={name: (SHAPE, torch.float32) for name in ("x", "labels")},
        loss_fn=lambda x, labels: (x - labels).square().mean(),
        schedule=schedule,
    )


def marked(program: ilm_compile.Program) -> int:
    return sum(bool(node.meta.get("leaves_weight")) for node in program.calls())


@pytest.mark.parametrize(
    ("block", "count"), [(Linear, 2), (Viewed, 2), (Scaled, 0), (Frozen, 0), (NoWeight, 0)]
)
def test_what_is_marked(block, count):
    program = compiled(Model(block))
    assert marked(program) == count
    assert any(f"split-backward: {count} of " in text for text in program.decisions)


def test_without_weight_parts_nothing_is_marked():
    assert marked(compiled(Model(Linear), "1f1b")) == 0


class Shared(nn.Module):
    """Both blocks have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Linear() for _ in range(4)])
        for layer in self.layers[1:]:
            layer.inner.weight = self.layers[0].inner.weight

    forward = Model.forward


def test_a_weight_of_several_regions_of_a_stage_keeps_its_gradient_in_the_backward():
    assert marked(compiled(Shared())) == 0


def stage_with_parts(block):
    [stage] = lower(compiled(Model(block))).stages
    module = stage.module.to_empty(device="cpu")
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("block", [Linear, Viewed])
def test_a_weight_waits_for_its_part_and_then_has_the_same_gradient(block):
    module = stage_with_parts(block)
    batch = torch.randn(SHAPE), torch.randn(SHAPE)
    module(*batch)[0].backward()
    whole = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()

    parts = WeightParts()
    with parts.collect():
        (loss,) = module(*batch)
    loss.backward()
    waiting = {name for name, p in module.named_parameters() if p.grad is None}
    assert waiting == {n for n in whole if n.endswith(("one", "two", "inner.weight"))} != set()
    parts.run()
    assert len(parts) == 0
    assert all(torch.equal(p.grad, whole[name]) for name, p in module.named_parameters())


def test_what_a_product_keeps_is_free_after_its_part():
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    parts = WeightParts()
    with parts.collect():
        memory = np.ones((2, WIDTH), dtype=np.float32)
        x, kept = torch.from_numpy(memory), weakref.ref(memory)
        y = leaving_weight(torch.ops.aten.linear.default)(x, weight)
    del x, memory
    y.sum().backward()
    del y
    assert (len(parts), weight.grad) == (1, None)
    assert kept() is not None
    parts.run()
    assert (len(parts), kept()) == (0, None)


def weights(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


IDS = torch.tensor([[1, 0, 3], [3, 2, 2]])
aten = torch.ops.aten
CALLS = {
    "linear": lambda: (aten.linear.default, weights(2, 3, 4), weights(5, 4), weights(5)),
    "linear of a view": lambda: (
        aten.linear.default, weights(3, 2, 4).transpose(0, 1), weights(5, 4)
    ),
    "linear by a view": lambda: (aten.linear.default, weights(2, 3, 4), weights(4, 5).t()),
    "matmul": lambda: (aten.matmul.default, weights(2, 3, 4), weights(4, 5)),
    "mm": lambda: (aten.mm.default, weights(3, 4), weights(4, 5)),
    "mm by a view": lambda: (aten.mm.default, weights(3, 4), weights(5, 4).t()),
    "addmm": lambda: (aten.addmm.default, weights(5), weights(3, 4), weights(4, 5)),
    "bmm": lambda: (aten.bmm.default, weights(2, 3, 4), weights(2, 4, 5)),
    "embedding": lambda: (aten.embedding.default, weights(4, 3), IDS),
    "embedding with padding": lambda: (aten.embedding.default, weights(4, 3), IDS, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_each_product_has_the_bits_of_the_plain_op(name):
    torch.manual_seed(0)
    op, *args = CALLS[name]()
    leaves = [a for a in args if getattr(a, "requires_grad", False)]
    plain = op(*args)
    seed = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, leaves, seed)
    parts = WeightParts()
    with parts.collect():
        found = leaving_weight(op)(*args)
    assert torch.equal(found, plain)
    for leaf in leaves:
        leaf.retain_grad()
    found.backward(seed)
    weight = args[spec_of(op).weight_part.weight]
    strides = []
    weight.register_hook(lambda grad: strides.append(grad.stride()))
    assert weight.grad is None
    parts.run()
    assert strides == [weight.stride()]  # or it would be copied
    assert all(torch.equal(leaf.grad, e) for leaf, e in zip(leaves, expected, strict=True))
