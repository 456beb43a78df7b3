"""What is known of an op: said in one place, and asked for by every room."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ilm_compile
from ilm_compile.cost import backward_flops, forward_flops
from ilm_compile.errors import IlmCompileError
from ilm_compile.ops import OpSpec, Precision, Strategy, define, product_from, rule, spec_of
from ilm_compile.ops.precision import PRODUCT
from ilm_compile.ops.spec import specs
from ilm_compile.passes import CastBF16
from ilm_compile.program.functions import FUNCTIONS
from ilm_compile.program.placement import R, S
from ilm_compile.program.vocab import vocab_cross_entropy

aten = torch.ops.aten
OPS = Path(ilm_compile.__file__).parent / "ops"


@torch.library.custom_op("example::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


@torch.library.custom_op("example::halved", mutates_args=(), tags=(torch.Tag.pointwise,))
def halved(x: Tensor) -> Tensor:
    return x / 2


product.register_fake(lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[1]))
halved.register_fake(lambda x: torch.empty_like(x))
PRODUCT_OP, HALVED = torch.ops.example.product.default, torch.ops.example.halved.default


def by_columns(call, wanted):
    """The columns of the weight are the columns of the result."""
    yield Strategy((R, S(1)), S(len(call.shape) - 1))


define(OpSpec(rule=by_columns, flops=product_from(0), precision=PRODUCT), PRODUCT_OP)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.weight = nn.Parameter(torch.randn(16, 32) / 4)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = halved(product(self.table(input_ids), self.weight))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def compiled(**plan):
    inputs = {name: ((2, 8), torch.int64) for name in ("input_ids", "labels")}
    return ilm_compile.partition(Model(), example_inputs=inputs, **plan)


def test_an_op_of_a_user_is_known_everywhere_by_one_definition():
    program = compiled(tp=2, dtype=torch.bfloat16)
    (node,) = program.graph.find_nodes(op="call_function", target=PRODUCT_OP)
    assert program.variables["weight"].layout.on("tp") == S(1)
    assert [source.meta["val"].dtype for source in node.all_input_nodes] == [torch.bfloat16] * 2
    assert forward_flops(node) == 2 * 2 * 8 * 16 * 16
    assert backward_flops(node) == 2 * forward_flops(node)
    assert PRODUCT.why in next(
        line for line in CastBF16.report(program).splitlines() if "example::product" in line
    )


def test_a_pointwise_op_keeps_its_rule_when_something_else_is_said_of_it():
    tagged = spec_of(HALVED).rule
    assert tagged is spec_of(aten.relu.default).rule
    define(OpSpec(precision=Precision("halves", inputs=torch.float32)), HALVED)
    assert spec_of(HALVED).rule is tagged
    assert spec_of(HALVED).precision.why == "halves"


@pytest.mark.parametrize(
    "target",
    [
        *(aten.mm.default, "aten::mm", "aten::_grouped_mm", aten._grouped_mm.default),
        *(vocab_cross_entropy, PRODUCT_OP),
    ],
    ids=lambda target: getattr(target, "__name__", target),
)
def test_an_op_is_not_given_twice(target):
    before = spec_of(target)
    with pytest.raises(IlmCompileError, match="is given twice; expected all that is known"):
        define(OpSpec(rule=by_columns, flops=product_from(0)), target)
    with pytest.raises(IlmCompileError, match="is given twice"):
        rule(target)(by_columns)
    assert spec_of(target) is before


def test_an_op_of_which_only_other_things_are_known_can_be_given_a_rule():
    define(OpSpec(precision=PRODUCT), "example::late")
    rule("example::late")(by_columns)
    assert spec_of("example::late") == OpSpec(rule=by_columns, precision=PRODUCT)


@pytest.mark.parametrize(
    "function", sorted(FUNCTIONS, key=lambda f: f.__name__), ids=lambda f: f.__name__
)
def test_a_function_of_the_graph_is_known_in_one_file_of_its_family(function):
    assert function in dict(specs())
    name = re.compile(rf"\b{function.__name__}\b")
    assert len([file.name for file in OPS.glob("*.py") if name.search(file.read_text())]) == 1
