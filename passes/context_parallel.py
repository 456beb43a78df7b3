"""Context parallelism: the ranks of the "cp" axis share every sequence.

Activations are sharded over tokens, parameters are R: each rank holds a part of their gradients.
Attention needs every key. It is computed by heads, an all-to-all exchanging tokens for heads before
and after it (DeepSpeed-Ulysses, arXiv:2309.14509), or by queries, with keys and values gathered
(Llama 3, arXiv:2407.21783, section 3.3.2) or sent round in a ring (arXiv:2310.01889), whichever is
cheapest. Causal attention by queries has head and tail pieces on each rank, where they divide, for
all ranks to have the same work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import fx

from ilm_compile.cost import forward_flops, hardware_named
from ilm_compile.errors import PlanError
from ilm_compile.ops.attention import HEAD_DIM, TOKEN_DIM
from ilm_compile.ops.call import Strategy, tensor_inputs
from ilm_compile.passes.shard import Shard
from ilm_compile.program.dump import target_name
from ilm_compile.program.layout import sharded_over
from ilm_compile.program.placement import Placement, R, S
from ilm_compile.program.plan import ATTENTION_WAYS
from ilm_compile.program.program import Program
from ilm_compile.program.query_attention import FORMS, parts_of
from ilm_compile.rewrite.kv_heads import fit_heads, share_heads
from ilm_compile.sharding import Restrictions, Solution
from ilm_compile.sharding.transitions import transition_time


@dataclass(frozen=True, kw_only=True)
class ContextParallel(Shard):
    """Shard activations over tokens on `size` ranks; attention: one of `ATTENTION_WAYS`."""

    name: ClassVar[str] = "context-parallel"
    axis: ClassVar[str] = "cp"
    after: ClassVar[frozenset[str]] = frozenset({sharded_over("tp"), sharded_over("ep")})
    ensures: ClassVar[frozenset[str]] = frozenset({"sharded", sharded_over("cp")})

    attention: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention not in ATTENTION_WAYS:
            raise PlanError(
                f"{self.name}: attention must be one of {ATTENTION_WAYS}, got {self.attention!r}"
            )

    def prepare(self, program: Program) -> Restrictions:
        """Repeat key heads where that pays, and say which tokens may lie in head and tail."""
        attentions = [node for node in program.calls() if node.target in TOKEN_DIM]
        if self.attention and self.size > 1 and not attentions:
            raise PlanError(
                f"{self.name}: cp_attention={self.attention!r}, but this model has no attention "
                "op: it writes its attention out, as products and a softmax (for attention "
                "dropout, or by its own choice), which are placed by cost; leave cp_attention out"
            )
        lengths = {_length(node) for node in attentions}
        uneven = sorted(n for n in lengths if n % self.size)
        by_queries = self.attention in ("queries", "ring")
        if by_queries and uneven:
            raise PlanError(
                f"{self.name}: cp_attention={self.attention!r}, but cp={self.size} does not divide "
                f"the {uneven[0]} tokens of an attention; make them a multiple of {self.size}"
            )
        if self.attention == "ring":
            share_heads(program, self.name, masked=True)
        if not by_queries:
            how: dict[str, Any] = {"pays": partial(_heads_pay, step=self)}
            if self.attention == "heads":
                how = {"instead": ", or cp_attention='queries'"}
            fit_heads(program, self.axis, self.size, name=self.name, **how)
        folded = frozenset(n for n in lengths if n % (2 * self.size) == 0)
        return Restrictions(
            name=self.name,
            attention=self.attention,
            folded=folded if self.attention != "heads" else frozenset(),
        )

    def report(self, program: Program, solution: Solution, num_collectives: int) -> None:
        """What share of the work is divided, and how attention is."""
        flops = {node: forward_flops(node) for node in solution.strategies}
        whole = [n for n, s in solution.strategies.items() if not any(p.cuts for p in s.inputs)]
        repeated = {node: flops[node] for node in whole if flops[node]}
        share = 1 - sum(repeated.values()) / max(1, sum(flops.values()))
        program.decisions.append(
            f"context-parallel: sequences are divided over {self.size} ranks, {share:.1%} of the "
            f"FLOPs with them; {num_collectives} collectives and local moves per micro-batch, "
            f"predicted {solution.answer.seconds * 1e3:.3f} ms forward and backward"
        )
        attentions = {n: s for n, s in solution.strategies.items() if _is_one(n)}
        ways = Counter(_way(node, s) for node, s in attentions.items())
        if ways:
            counted = ", ".join(f"{way} ({count})" for way, count in sorted(ways.items()))
            why = "as asked for" if self.attention else "the cheapest way; cp_attention forces one"
            program.decisions.append(f"context-parallel: attention is computed {counted}, {why}")
            program.decisions += self._kept(program, attentions)
        if repeated:
            worst = max(repeated, key=repeated.__getitem__)
            program.warnings.append(
                f"context-parallel: {len(repeated)} products and attentions, {1 - share:.1%} of "
                f"the FLOPs, are computed whole on all {self.size} ranks, the largest of them "
                f"{target_name(worst)} at {program.where(worst)}"
            )

    def _kept(self, program: Program, attentions: dict[fx.Node, Strategy]) -> Iterator[str]:
        """Yield what a rank keeps of the keys and values of the attention with most of them."""
        ranks = {"by queries": self.size, "in a ring": 1}  # whose keys and values one keeps
        for way, kept in ranks.items():
            found = [n for n, s in attentions.items() if _way(n, s).startswith(way)]
            if found:
                each = max(_key_bytes(program, node) for node in found) / self.size / 2**20
                yield (
                    f"context-parallel: {way}, a rank keeps {each * kept:.4g} MiB for backward, of "
                    f"the {each * self.size:.4g} MiB of an attention's keys and values"
                )


def _length(node: fx.Node) -> int:
    query = tensor_inputs(node)[0].meta["val"]
    return int(query.shape[TOKEN_DIM[node.target]])


def _key_bytes(program: Program, node: fx.Node) -> int:
    """Return the bytes of all keys and values of an attention."""
    values = [each.meta["val"] for each in tensor_inputs(node)[1:3]]
    itemsize = 2 if program.plan.dtype else values[0].element_size()
    return parts_of(node) * int(sum(value.numel() for value in values) * itemsize)


def _heads_pay(node: fx.Node, repeats: int, *, step: ContextParallel) -> bool:
    """Whether exchanging tokens for heads, the key heads repeated, beats gathering keys and values.

    The work is the same where head and tail pieces are.
    """
    size, (query, key, value) = step.size, tensor_inputs(node)[:3]
    if _length(node) % size:
        return True
    rank = query.meta["val"].dim()
    tokens, heads = (S(dims[node.target] % rank) for dims in (TOKEN_DIM, HEAD_DIM))

    def seconds(moved: fx.Node, source: Placement, target: Placement) -> float:
        return transition_time(moved, source, target, size, hardware_named(step.hardware), True)

    by_heads = seconds(query, tokens, heads) + seconds(node, heads, tokens)
    by_heads += repeats * sum(seconds(each, tokens, heads) for each in (key, value))
    return by_heads < sum(seconds(each, tokens, R) for each in (key, value))


def _is_one(node: fx.Node) -> bool:
    return node.target in TOKEN_DIM or node.target in FORMS


def _way(node: fx.Node, strategy: Strategy) -> str:
    query = strategy.inputs[0]
    if node.target in FORMS:
        name = "in a ring" if parts_of(node) > 1 else "by queries"
        return f"{name}, head and tail on each rank" if query.folded else name
    rank = node.meta["val"].dim()
    if not query.is_shard:
        return "whole on every rank"
    return "by queries" if query.dim == TOKEN_DIM[node.target] % rank else "by heads"
