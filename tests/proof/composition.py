"""Faults of composed parallelism: edits of a compiled graph, and patches of what runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ilm_compile.program import collectives, vocab
from ilm_compile.program.collectives import TRANSITIONS, redistribute
from ilm_compile.program.layout import Layout, layout_of
from ilm_compile.program.placement import R, S, split_shards
from ilm_compile.program.program import Program
from ilm_compile.runtime import norm
from ilm_compile.runtime.checkpoint import contents
from ilm_compile.runtime.parallel import Parallel
from ilm_compile.runtime.parameters import Parameters
from ilm_compile.runtime.step_inputs import StepInputs

VOCAB, HIDDEN = 64, 32
AUXILIARY = 0.125  # of the router's loss
Plant = Callable[[pytest.MonkeyPatch], None]


class TwoHeads(nn.Module):
    """Predicts the next token and, by a further head, the one after it, with fewer targets."""

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.block = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.GELU())
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.further = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.smoothing = smoothing

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.block(x)
        logits, later = self.head(x).flatten(0, 1), self.further(x)[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten(), label_smoothing=self.smoothing)
        return loss + 0.3 * F.cross_entropy(later, labels[:, 1:].flatten())


def two_heads(smoothing: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TwoHeads(smoothing).double()


# Faults in the graph


def first(program: Program, wanted: Callable[[fx.Node], object]) -> fx.Node:
    return next(node for node in program.graph.nodes if wanted(node))


def moves(node: fx.Node, axis: str, src: str, dst: str) -> bool:
    """Whether `node` is a collective on `axis` between placements of these kinds."""
    kinds = [str(node.kwargs.get(key))[:1] for key in ("src", "dst")]
    return node.target is redistribute and [node.kwargs["axis"], *kinds] == [axis, src, dst]


def comes_from(node: fx.Node, name: str) -> bool:
    return node.name == name or any(comes_from(each, name) for each in node.all_input_nodes)


def gather_logits(program: Program) -> None:
    loss = first(program, lambda node: node.target is vocab.vocab_cross_entropy)
    logits = loss.all_input_nodes[0]
    place, value = layout_of(logits).on("tp"), logits.meta["val"]
    typed = {"src": str(place), "dst": str(R), "axis": "tp"}
    with program.graph.inserting_before(loss):
        whole = program.graph.call_function(redistribute, (logits,), typed)
    whole.meta = {
        **logits.meta,
        "layout": layout_of(logits).with_placement("tp", R),
        "val": value.new_empty(place.global_shape(value.shape, 2)),
    }
    loss.replace_input_with(logits, whole)


def slice_mask_over_tp(program: Program) -> None:
    mask = first(program, lambda n: moves(n, "cp", "I", "S") and comes_from(n, "attention_mask"))
    mask.kwargs = {**mask.kwargs, "axis": "tp"}


def cut_weight_over_cp(program: Program) -> None:
    node = first(program, lambda node: str(node.target).endswith("wqkv.weight"))
    node.meta["layout"] = program.variables[str(node.target)].layout = Layout.of({"cp": S(0)})


def average_own_tokens(program: Program) -> None:
    """The mean of the tokens of this cp rank, and of the ranks' means that of all."""
    loss = first(program, lambda node: "cross_entropy" in str(node.target))
    loss.args = (*loss.args[:3], vocab.MEAN, *loss.args[4:])


def scale_auxiliary_loss(program: Program) -> None:
    node = first(program, lambda node: AUXILIARY in node.args)
    node.args = tuple(2 * arg if arg == AUXILIARY else arg for arg in node.args)


def sum_auxiliary_loss_twice(program: Program) -> None:
    """What the ranks have added up already is added up again."""
    total = first(
        program, lambda n: moves(n, "ep", "P", "I") and "mlp" not in program.source(n).module_path
    )
    with program.graph.inserting_after(total):
        twice = program.graph.node_copy(total)
    total.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    twice.args = (total,)


def forget_norm_gradient(program: Program) -> None:
    norm = first(
        program, lambda n: moves(n, "tp", "I", "R") and "q_norm" in str(n.all_input_nodes[0].target)
    )
    norm.replace_all_uses_with(norm.all_input_nodes[0])
    program.graph.erase_node(norm)


# Faults in what runs the graph


class MeanOfOwnShard:
    """What label smoothing averages over the vocabulary, it averages over this rank's part."""

    def __init__(self, axis: str) -> None:
        self.real = collectives.communicator(axis)
        self.rank, self.size = self.real.rank, self.real.size

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        total = self.real.all_reduce(x, op)
        if len(x) == 3:  # exponentials, target logits, and all logits
            total[2] = x[2] * self.size
        return total


def smooth_over_own_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    real = vocab.vocab_cross_entropy_backward

    def backward(*arguments: Any) -> Tensor:
        return real(*arguments[:-1], arguments[-1] // 2)

    monkeypatch.setattr(vocab, "communicator", MeanOfOwnShard)
    monkeypatch.setattr(vocab, "vocab_cross_entropy_backward", backward)


def count_own_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the further head alone."""

    def of_step(self: StepInputs, batch: Mapping[str, Tensor], step: int) -> Any:
        own, counts = self.layout.own(batch), self.count(batch)
        further = max(counts)
        counts[further] = self.count(own)[further] * self.layout.dp.size
        return self.of_rows(own, counts, step)

    monkeypatch.setattr(StepInputs, "of_step", of_step)


def recompute_over_cp(monkeypatch: pytest.MonkeyPatch) -> None:
    real = collectives.communicator

    def other(axis: str) -> Any:
        is_backward = torch._C._current_graph_task_id() != -1
        return real("cp" if axis.startswith("tp[") and is_backward else axis)

    monkeypatch.setattr(collectives, "communicator", other)


def scatter_by_place_on_cp(monkeypatch: pytest.MonkeyPatch) -> None:
    place = collectives.communicator

    def scatter(x: Tensor, comm: Any, src: Any, dst: Any) -> Tensor:
        return split_shards(comm.all_reduce(x), dst, comm.size)[place("cp").rank].contiguous()

    name, _, backward = TRANSITIONS["P", "S"]
    monkeypatch.setitem(TRANSITIONS, ("P", "S"), (name, scatter, backward))


def leave_out_of_norm(name: str, axis: str) -> Plant:
    """All parts of a parameter but the first."""

    def grad_norm(self: Parallel) -> Tensor:
        counted = [
            gradient
            for shard in self.parameters.parameters()
            if (gradient := shard.gradient()) is not None
            and self.parameters.counts(shard)
            and not (self.mesh.axes[axis].rank and name in shard.variable.name)
        ]
        return norm.global_norm(counted, self.mesh)

    return lambda monkeypatch: monkeypatch.setattr(Parallel, "grad_norm", grad_norm)


def norm_gradient_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    name, forward, _ = TRANSITIONS["I", "R"]
    monkeypatch.setitem(TRANSITIONS, ("I", "R"), (name, forward, forward))


def gradient_not_summed_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the output norm: each cp rank keeps the part of its own tokens."""
    real = Parameters.collect_gradients

    def collect(self: Parameters, **keywords: Any) -> None:
        shard = self.shards["norm.weight"]
        own = shard.leaf.grad.clone()
        real(self, **keywords)
        shard.public.grad.copy_(own)

    monkeypatch.setattr(Parameters, "collect_gradients", collect)


def name_layers_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    real = contents._cut

    def cut(name: str, shard: Any, *rest: Any) -> Any:
        return real(name.replace(f"layers.{shard.stage}.", "layers.0."), shard, *rest)

    monkeypatch.setattr(contents, "_cut", cut)
