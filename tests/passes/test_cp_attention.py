"""How context parallelism divides attention: what is chosen, what is refused, who does how much."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ilm_compile import models, partition
from ilm_compile.cost import HARDWARE, node_time
from ilm_compile.errors import PlanError
from ilm_compile.kernels.attention_blocks import KERNELS
from ilm_compile.ops.attention import SDPA
from ilm_compile.program.collectives import TRANSITIONS, redistribute
from ilm_compile.program.communicator import ShapeCommunicator, communicators
from ilm_compile.program.layout import layout_of
from ilm_compile.program.placement import Placement, S
from ilm_compile.program.plan import Plan
from ilm_compile.program.query_attention import FORMS
from tests.support.equality import hf_gpt2, hf_llama

SEQ = 32
LONG = (16384, 16388)
WAYS = {
    "heads": "by heads",
    "queries": "by queries, head and tail on each rank",
    "ring": "in a ring, head and tail on each rank",
}


def example(seq: int = SEQ, rows: int = 2):
    return {name: ((rows, seq), torch.int64) for name in ("input_ids", "labels")}


def divided(model, seq: int = SEQ, **keywords):
    return partition(model, example_inputs=example(seq), **keywords)


def how(program) -> str:
    (text,) = (d for d in program.decisions if "attention is computed" in d)
    return text.removeprefix("context-parallel: attention is computed ")


@pytest.mark.parametrize(
    ("kv_heads", "seq", "way"), [(32, 1024, "heads"), (2, 4096, "queries"), (32, 65536, "ring")]
)
def test_the_cheapest_way_is_taken(kv_heads, seq, way):
    """Keys and values of few heads are cheaper to gather than queries of many to exchange.

    On long rows a rank has enough to do with one part of the keys while the next one comes.
    """
    with torch.device("meta"):
        model = models.internlm2_7b(num_layers=1, num_kv_attention_heads=kv_heads)
    program = partition(model, example_inputs=example(seq, rows=1), cp=4)
    assert how(program).startswith(WAYS[way] + " (1), the cheapest way")


@pytest.mark.parametrize("way", WAYS)
def test_either_way_can_be_forced(way):
    program = divided(models.internlm2_tiny(num_layers=2), cp=2, cp_attention=way)
    assert how(program) == f"{WAYS[way]} (2), as asked for"
    assert Plan.from_json(program.plan.to_json()).cp_attention == way


@pytest.mark.parametrize(("way", "kept"), [("queries", 4), ("ring", 2)])
def test_what_is_kept_of_keys_and_values_is_told(way, kept):
    """Of 2 rows of 32 tokens, 4 heads of 8 numbers, keys and values, 4 bytes each."""
    program = divided(hf_llama(), cp=2, cp_attention=way)
    (text,) = (d for d in program.decisions if "keeps" in d)
    heads = 2 if way == "queries" else 1  # repeated by the model, once they are gathered
    whole = heads * 2 * SEQ * 4 * 8 * 2 * 4 / 2**20
    assert f"a rank keeps {whole * kept / 4:.4g} MiB for backward, of the {whole:.4g} MiB" in text


def test_heads_that_do_not_divide_are_no_reason_for_whole_attention():
    program = divided(hf_gpt2(3), cp=4)
    assert how(program).startswith(WAYS["queries"])
    assert program.warnings == []


def test_pieces_that_do_not_fold_are_cut_once():
    program = divided(hf_gpt2(3), seq=20, cp=2)  # 20 tokens fold on two ranks
    assert how(program).startswith(WAYS["queries"])
    program = divided(hf_gpt2(3), seq=20, cp=4)  # and not on four
    assert how(program).startswith("by queries (4)")
    assert not any(p.folded for node in program.calls() for _, p in layout_of(node).placed)


def test_the_slowest_rank_counts_against_queries():
    """16,384 tokens fold on four ranks, 16,388 do not: the last rank would have most work."""
    with torch.device("meta"):
        model = models.internlm2_7b(num_layers=1, num_kv_attention_heads=8)
    ways = [how(partition(model, example_inputs=example(n, rows=1), cp=4)) for n in LONG]
    assert [way.partition(" (")[0] for way in ways] == [WAYS["queries"], "by heads"]


def test_tokens_fold_under_a_loss_that_does_not_ask_for_it():
    def last_token(outputs, labels):
        return (outputs.logits[:, -1].sum(-1) * labels[:, 0]).sum()

    ids = {"input_ids": ((2, SEQ), torch.int64), "labels": ((2, 1), torch.int64)}
    program = partition(hf_gpt2(3), example_inputs=ids, loss_fn=last_token, cp=4)
    assert how(program).startswith(WAYS["queries"])


def test_keys_are_gathered_before_they_are_repeated():
    """Hugging Face models repeat key heads themselves, and what is repeated need not be sent."""
    program = divided(hf_llama(), cp=2, cp_attention="queries")
    gathered = {node.meta["val"].numel() for node in program.calls() if is_move(node, "all_gather")}
    kv_heads, head_dim = 4, 8
    assert gathered == {2 * SEQ * kv_heads * head_dim}


def test_a_ring_sends_heads_before_they_are_repeated():
    program = divided(hf_llama(), cp=2, cp_attention="ring")
    shapes = {tuple(n.args[1].meta["val"].shape) for n in program.calls() if n.target in FORMS}
    assert shapes == {(2, 4, SEQ // 2, 8)}  # rows, heads, tokens, head size
    said = "context-parallel: 4 attentions read their key-value heads before they are repeated"
    assert said in program.decisions


@pytest.mark.parametrize(
    ("tp", "masks", "heads"), [(1, (), 4), (2, (), 2), (1, ("attention_mask",), 8)]
)
def test_without_a_mask_heads_are_read_before_they_are_repeated(tp, masks, heads):
    """Few kernels take both a mask and shared heads; Hugging Face repeats them then, too."""
    inputs = example() | {name: ((2, SEQ), torch.int64) for name in masks}
    program = partition(hf_llama(), example_inputs=inputs, tp=tp)
    keys = [n.args[1].meta["val"] for n in program.calls() if n.target is SDPA]
    assert [key.shape[1] for key in keys] == [heads] * 4


def is_move(node, name: str) -> bool:
    kinds = tuple(Placement.parse(str(node.kwargs.get(key, "I"))).kind for key in ("src", "dst"))
    return node.target is redistribute and TRANSITIONS[kinds][0] == name


def test_nothing_is_folded_where_attention_goes_by_heads():
    program = divided(models.internlm2_tiny(num_layers=2), cp=2, cp_attention="heads")
    assert not any(p.folded for node in program.calls() for _, p in layout_of(node).placed)


@pytest.mark.parametrize("asked", ["queries", None])
def test_key_heads_are_not_repeated_for_queries(asked):
    program = divided(models.internlm2_tiny(num_layers=1), cp=8, cp_attention=asked)
    assert how(program).startswith(WAYS["queries"])
    assert not any("repeated" in decision for decision in program.decisions)


REFUSED = {
    "heads that do not divide": (
        {"cp": 4, "cp_attention": "heads"},
        lambda: hf_gpt2(3),
        "cp=4 does not divide the 3 attention heads .* use one of cp=[1, 3], "
        "or cp_attention='queries'",
    ),
    "tokens that do not divide": (
        {"cp": 5, "cp_attention": "queries"},
        lambda: hf_gpt2(3),
        "cp_attention='queries', but cp=5 does not divide the 32 tokens",
    ),
    "attention written out": (
        {"cp": 2, "cp_attention": "heads"},
        lambda: with_attention_dropout(),
        "cp_attention='heads', but this model has no attention op: it writes its attention out",
    ),
    "no ranks": (
        {"cp_attention": "heads"},
        lambda: hf_gpt2(3),
        "cp_attention='heads' needs cp > 1, got cp=1",
    ),
    "another word": (
        {"cp": 2, "cp_attention": "rings"},
        lambda: hf_gpt2(3),
        "cp_attention must be one of (None, 'heads', 'queries', 'ring'), got 'rings'",
    ),
}


def with_attention_dropout():
    model = hf_gpt2()
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.1
    return model.train()


@pytest.mark.parametrize(("plan", "make", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_is_refused_with_numbers(plan, make, message):
    pattern = ".*".join(map(re.escape, message.split(".*")))
    with pytest.raises(PlanError, match=pattern):
        divided(make(), **plan)


def counted_flops(seq: int, size: int, attention: str) -> list[int]:
    """The FLOPs that each rank's local attention does, counted as it runs."""
    program = divided(hf_gpt2(3), seq=seq, cp=size, cp_attention=attention)
    node = next(node for node in program.calls() if node.target in FORMS)
    tensors = iter([torch.randn(n.meta["val"].shape) for n in node.all_input_nodes])
    args = torch.fx.node.map_arg(node.args, lambda _: next(tensors))
    found = []
    for rank in range(size):
        here = ShapeCommunicator(size)
        here.rank = rank
        counter = FlopCounterMode(display=False)  # which knows products, and not all fused ops
        with communicators(cp=here), sdpa_kernel(SDPBackend.MATH), counter, blocks() as scores:
            node.target(*args, **node.kwargs)
        found.append(counter.get_total_flops() + sum(scores))
    return found


@contextmanager
def blocks() -> Iterator[list[int]]:
    """Within it, what each block of a ring does is listed: into the op no counter looks."""
    counted: list[int] = []
    run, backward = KERNELS["cpu"]

    def counting(q, k, v, *rest):
        counted.append(4 * q.numel() * k.shape[-2])
        return run(q, k, v, *rest)

    with mock.patch.dict(KERNELS, cpu=(counting, backward)):
        yield counted


@pytest.mark.parametrize("attention", ["queries", "ring"])
def test_head_and_tail_pieces_give_every_rank_the_same_work(attention):
    """36 tokens are no 8 pieces."""
    folded, once = (counted_flops(seq, 4, attention) for seq in (32, 36))
    assert folded == [folded[0]] * 4
    assert folded[0] > 0
    assert [n // once[0] for n in once] == [1, 2, 3, 4]
    assert max(once) / (sum(once) / 4) == 1.6


@pytest.mark.parametrize("attention", ["queries", "ring"])
def test_the_cost_model_counts_the_slowest_rank(attention):
    program = divided(hf_gpt2(3), seq=4096, cp=4, cp_attention=attention)
    node = next(node for node in program.calls() if node.target in FORMS)
    assert node.args[-3] == str(S(2, folded=True))
    hardware = HARDWARE["h100"]
    latency = hardware.kernel_overhead_s
    balanced = node_time(node, hardware, dtype=torch.bfloat16) - latency
    node.args = (*node.args[:-3], str(S(2)), *node.args[-2:])
    slowest = node_time(node, hardware, dtype=torch.bfloat16) - latency
    assert slowest / balanced == pytest.approx(7 / 4, rel=1e-3)
