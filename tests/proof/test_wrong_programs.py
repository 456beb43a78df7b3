"""Wrong programs that a proof by a small rebuilt model let through: each is caught and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

import ilm_compile
from ilm_compile.passes import Pass, insert_after, wrap
from ilm_compile.program.dropout import seeded_dropout
from ilm_compile.program.program import Program
from tests.proof.small import INPUTS, make_model
from tests.proof.test_right_programs import freeze, internlm2, tied_by_hand
from tests.support.zoo import small_model

aten = torch.ops.aten
Edit = Callable[[Program], object]
BF16 = {"dtype": torch.bfloat16}
EVERY_INPUT = {**INPUTS, **{n: INPUTS["labels"] for n in ("position_ids", "attention_mask")}}
DOCUMENTS = {**INPUTS, "cu_seqlens": ((2, 4), torch.int32)}
LONG = {name: ((1, 32), torch.int64) for name in (*INPUTS, "attention_mask")}


@dataclass(frozen=True, kw_only=True)
class Meddle(Pass):
    """Does `edit` when all other passes are done."""

    name: ClassVar[str] = "meddle"
    after: ClassVar[frozenset[str]] = frozenset({"sharded", "cast", "staged"})
    edit: Edit

    def apply(self, program: Program) -> None:
        self.edit(program)


def find(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if name in (node.name, node.target))


def argument(name: str, index: int, value: Any) -> Edit:
    """Set an argument of the node `name`."""

    def edit(program: Program) -> None:
        node = find(program, name)
        node.args = (*node.args[:index], value, *node.args[index + 1 :])

    return edit


def keyword(name: str, **values: Any) -> Edit:
    return lambda program: setattr(find(program, name), "kwargs", values)


def wrapped(name: str, change: Callable[[Any], Any]) -> Edit:
    return lambda program: wrap(program, find(program, name), change)


def variable(name: str, **facts: Any) -> Edit:
    def edit(program: Program) -> None:
        program.variables[name] = replace(program.variables[name], **facts)

    return edit


def double_logits(program: Program) -> None:
    logits = program.outputs[1]
    doubled = insert_after(program, logits, aten.mul.Tensor, logits, 2.0)
    program.graph.output_node().replace_input_with(logits, doubled)


def window(first: int, size: int = 3) -> Edit:
    """Cut off keys further back than `size` tokens, in every layer from the `first` one on."""

    def edit(program: Program) -> None:
        calls = program.graph.find_nodes(
            op="call_function", target=aten.scaled_dot_product_attention.default
        )
        for node in calls[first:]:
            mask = node.args[3] if len(node.args) > 3 else node.kwargs["attn_mask"]
            cut = insert_after(program, mask, aten.triu.default, mask, -size)
            node.replace_input_with(mask, cut)

    return edit


def drop_nothing(program: Program) -> None:
    node = program.graph.find_nodes(op="call_function", target=seeded_dropout)[-1]
    node.replace_all_uses_with(node.args[0])
    program.finish()


def other_rate(program: Program) -> None:
    node = program.graph.find_nodes(op="call_function", target=seeded_dropout)[-1]
    index = next(i for i, value in enumerate(node.args) if value == 0.1)
    node.args = (*node.args[:index], 0.2, *node.args[index + 1 :])


def gpt2() -> Any:
    return small_model("GPT2LMHeadModel", resid_pdrop=0.1, attn_pdrop=0.0, embd_pdrop=0.0)


def rounded(x: Any) -> Any:
    return x.to(torch.bfloat16).to(torch.float32)


@dataclass(frozen=True)
class Attack:
    """What is broken, and the layer and the words that must tell of it."""

    build: Callable[[], Any]
    edit: Edit
    layer: str
    words: str
    inputs: dict[str, Any]
    plan: dict[str, Any]


def attack(
    build: Any, edit: Edit, words: str, layer: str = "regions", inputs: Any = INPUTS, **plan: Any
) -> Attack:
    made = (lambda: make_model(build)) if isinstance(build, str) else build
    return Attack(made, edit, layer, words, inputs, plan)


def single() -> Any:
    return make_model("internlm2").float()


ATTACKS = {
    "epsilon of the last norm": attack(
        "internlm2", argument("rms_norm_4", 3, 1e-3), "node rms_norm_4", tp=2
    ),
    "epsilon of a late block": attack(
        lambda: internlm2(4), argument("rms_norm_7", 3, 1e-3), "node rms_norm_7", pp=2
    ),
    "scale in the last block": attack(
        lambda: internlm2(3), keyword("attention_2", scale=0.7), "node attention_2", tp=2
    ),
    "window in one layer": attack(
        "hf-llama", window(1), "scaled_dot_product_attention_1", inputs=EVERY_INPUT
    ),
    "window in every layer": attack(
        "hf-llama", window(0), "scaled_dot_product_attention", inputs=EVERY_INPUT, pp=2
    ),
    "positions ignored": attack(
        "hf-llama",
        wrapped("position_ids", lambda p: torch.ones_like(p).cumsum(1) - 1),
        "layers.0",
        inputs=EVERY_INPUT,
    ),
    "mask ignored": attack(
        "hf-llama",
        wrapped("attention_mask", torch.ones_like),
        "layers.0",
        inputs=EVERY_INPUT,
        tp=2,
    ),
    "documents ignored": attack(
        "internlm2", argument("attention_1", 3, None), "node attention_1", inputs=DOCUMENTS, tp=2
    ),
    "logits doubled": attack("hf-llama", double_logits, "logits"),
    "frozen weight trained": attack(
        lambda: freeze(internlm2(), "norm"),
        variable("norm.weight", requires_grad=True),
        "norm.weight has requires_grad True; the model has False",
        "types",
    ),
    "further name dropped": attack(
        tied_by_hand,
        variable("tok_embeddings.weight", aliases=()),
        "tok_embeddings.weight has further names",
        "types",
    ),
    "last column counted": attack(
        "internlm2",
        wrapped("labels", lambda x: torch.cat([x[:, :-1], x[:, -1:].clamp_min(0)], 1)),
        "after pass meddle",
    ),
    "highest id looked up as the first": attack(
        lambda: small_model("LlamaForCausalLM"),
        wrapped("input_ids", lambda x: x % 511),
        "node embedding",
    ),
    "window of 20 tokens": attack(
        lambda: small_model("LlamaForCausalLM"),
        window(0, 20),
        "scaled_dot_product_attention",
        inputs=LONG,
    ),
    "nothing dropped": attack(gpt2, drop_nothing, "after pass meddle"),
    "dropped at another rate": attack(gpt2, other_rate, "mlp.dropout", tp=2),
    "gradient tripled": attack(
        "internlm2",
        wrapped("linear_6", lambda x: x * 3 - x.detach() * 2),
        "the first gradient that differs is that of node linear_6",
        pp=2,
    ),
    "positions rounded": attack(
        single, wrapped("to_1", lambda x: rounded(x + 1000) - 1000), "rounds what", "types", **BF16
    ),
    "count of targets rounded": attack(
        single, wrapped("num_targets", rounded), "rounds what", "types", **BF16
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_wrong_program_is_caught_by_its_layer_and_named(name: str) -> None:
    case = ATTACKS[name]
    report = ilm_compile.verify(
        case.build(), example_inputs=case.inputs, passes=[Meddle(edit=case.edit)], **case.plan
    )
    assert [check.name for check in report.checks if not check.ok] == [case.layer], str(report)
    assert case.words in report.failures[0]
