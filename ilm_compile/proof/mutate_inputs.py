"""Faults of what a model is given and of what may see what: positions, masks, documents, labels,
ids, windows of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import fx

from ilm_compile.ops.attention import ATTENTION, SDPA
from ilm_compile.program.arguments import argument
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.layout import INVARIANT, Layout, layout_of
from ilm_compile.program.placement import Placement, R, S
from ilm_compile.program.program import Program
from ilm_compile.proof.mutate_places import (
    Kind,
    Place,
    aten,
    calls,
    inputs,
    put,
    reroute,
    rerouted,
    set_argument,
    users_of,
    value_of,
)

IGNORED, HIDDEN = -100, -1e9
WINDOW = 20  # tokens: more than a proof on sixteen could see
SOFTMAX = aten.softmax.int


def ignore_positions(program: Program) -> Iterator[Place]:
    """Every row is counted from 0, whatever positions are given."""

    def edit(program: Program, node: fx.Node) -> None:
        val = node.meta["val"]

        def counted(user: fx.Node) -> fx.Node:
            row = put(program, user, aten.arange.default, val.shape[-1], dtype=val.dtype)
            return put(program, user, aten.expand.default, row, list(val.shape))

        reroute(program, node, counted)

    for node in inputs(program, "position"):
        yield node, "", edit


def ignore_mask(program: Program) -> Iterator[Place]:
    """Padding is attended to."""
    for node in inputs(program, "attention_mask"):
        yield node, "", rerouted(aten.ones_like.default)


def ignore_documents(program: Program) -> Iterator[Place]:
    """Attention, or the positions, go on over the boundaries of documents."""

    def edit(position: int, program: Program, node: fx.Node) -> None:
        user = users_of(node)[position]
        if user.target is ATTENTION:
            set_argument(user, "cu_seqlens", None)
            return
        whole = put(program, user, aten.clamp.default, node, None, 0)
        user.replace_input_with(node, whole)

    for node in inputs(program, "cu_seqlens"):
        for position, user in enumerate(users_of(node)):
            yield node, f"in {user.name}", partial(edit, position)


def count_ignored(program: Program) -> Iterator[Place]:
    """A label of -100, in the last column or anywhere, counts as class 0."""

    def edit(only_last: bool, program: Program, node: fx.Node) -> None:
        length = node.meta["val"].shape[-1]

        def counted(user: fx.Node) -> fx.Node:
            wrong = put(program, user, aten.eq.Scalar, node, IGNORED)
            if only_last:
                column = put(program, user, aten.arange.default, length)
                last = put(program, user, aten.eq.Scalar, column, length - 1)
                wrong = put(program, user, aten.logical_and.default, wrong, last)
            return put(program, user, aten.masked_fill.Scalar, node, wrong, 0)

        reroute(program, node, counted)

    for node in inputs(program, "labels"):
        if node.meta["val"].dim() > 1:
            yield node, "in the last column", partial(edit, True)
        yield node, "anywhere", partial(edit, False)


def clamp_ids(program: Program) -> Iterator[Place]:
    """Ids, or labels, above some number are taken for that number."""
    for node in inputs(program, "input_ids", "labels"):
        yield node, "at 5", rerouted(aten.clamp.default, None, 5)


def one_window(program: Program) -> Iterator[Place]:
    """Attention of one block sees the nearest quarter of the sequence only."""
    for node in _attentions(program):
        yield node, f"of {_length(node) // 4}", partial(_look_back, _length(node) // 4)


def every_window(program: Program) -> Iterator[Place]:
    """Attention of every block sees 20 tokens only."""

    def edit(program: Program, node: fx.Node) -> None:
        for each in _attentions(program):
            _look_back(WINDOW, program, each)

    found = [node for node in _attentions(program) if _length(node) > WINDOW]
    if found:
        yield found[0], f"{len(found)} blocks", edit


def _attentions(program: Program) -> list[fx.Node]:
    """The attentions of each token over tokens, by one op or written out; one with documents,
    which takes no mask, is left out."""
    square = []
    for node in calls(program, SDPA, ATTENTION, SOFTMAX):
        value = value_of(node)
        assert value is not None
        is_written = node.target is SOFTMAX
        if (is_written and (value.dim() < 3 or value.shape[-1] != value.shape[-2])) or (
            node.target is ATTENTION and argument(node, "cu_seqlens") is not None
        ):
            continue
        square.append(node)
    return square


def _length(node: fx.Node) -> int:
    return int(node.meta["val"].shape[1 if node.target is ATTENTION else -2])


def _look_back(window: int, program: Program, node: fx.Node) -> None:
    length, is_placed = _length(node), "layout" in node.meta
    # the ranks' heads share a mask
    whole = Layout.of({axis: R for axis, place in layout_of(node).placed if place.is_shard})

    def emit(target: object, *args: object, **kwargs: object) -> fx.Node:
        return put(program, node, target, *args, placed=whole if is_placed else None, **kwargs)

    ones = emit(aten.ones.default, [length, length], dtype=torch.bool)
    if is_placed:
        ones.meta["layout"] = INVARIANT
    for axis, _ in whole.placed:
        move: dict[str, Any] = {"src": "I", "dst": "R", "axis": axis}
        with program.graph.inserting_before(node):
            copy = program.graph.call_function(redistribute, (ones,), move)
        copy.meta = {**ones.meta, "layout": layout_of(ones).with_placement(axis, R)}
        ones = copy
    seen = emit(aten.triu.default, ones, 1 - window)
    if node.target is SOFTMAX:
        far = emit(aten.logical_not.default, seen)
        scores = node.all_input_nodes[0]
        placed = layout_of(scores) if is_placed else None
        call = (aten.masked_fill.Scalar, scores, far, HIDDEN)
        node.update_arg(0, put(program, node, *call, placed=placed))
    elif node.target is SDPA:
        _mask(program, node, seen, emit)
    else:
        _write_out(program, node, emit(aten.tril.default, seen), is_placed)


def _mask(program: Program, node: fx.Node, seen: fx.Node, emit: Callable[..., fx.Node]) -> None:
    """Give a fused attention the mask `seen` beside its own."""
    own = argument(node, "attn_mask")
    mask = emit(aten.tril.default, seen) if argument(node, "is_causal") else seen
    if isinstance(own, fx.Node) and own.meta["val"].dtype == torch.bool:
        mask = emit(aten.logical_and.default, own, mask)
    elif isinstance(own, fx.Node):
        mask = emit(aten.masked_fill.Scalar, own, emit(aten.logical_not.default, mask), HIDDEN)
    rate = argument(node, "dropout_p")
    node.args = node.args[:3]
    node.kwargs = {**node.kwargs, "attn_mask": mask, "dropout_p": rate, "is_causal": False}


def _turned(place: Placement) -> Placement:
    """Return how heads and tokens lie when they change places."""
    return S(3 - place.dim) if place.is_shard and place.dim in (1, 2) else place


def _write_out(program: Program, node: fx.Node, mask: fx.Node, is_placed: bool) -> None:
    """Put torch's attention, heads before tokens, in the place of ours."""

    def turned(value: fx.Node) -> fx.Node:
        placed = Layout.of({axis: _turned(place) for axis, place in layout_of(value).placed})
        call = (aten.transpose.int, value, 1, 2)
        return put(program, node, *call, placed=placed if is_placed else None)

    q, k, v = (turned(value) for value in node.all_input_nodes[:3])
    scale = argument(node, "scale")
    made = put(
        program,
        node,
        SDPA,
        *(q, k, v),
        placed=layout_of(q) if is_placed else None,
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    node.replace_all_uses_with(turned(made))


def see_the_future(program: Program) -> Iterator[Place]:
    """Attention of one block sees the tokens behind."""

    def edit(program: Program, node: fx.Node) -> None:
        set_argument(node, "is_causal", False)

    for node in calls(program, SDPA):
        if argument(node, "is_causal"):
            yield node, "", edit


KINDS: dict[str, Kind] = {
    "ignore position ids": ignore_positions,
    "ignore an attention mask": ignore_mask,
    "ignore documents": ignore_documents,
    "count an ignored label": count_ignored,
    "clamp ids": clamp_ids,
    "window in one attention": one_window,
    "window in every attention": every_window,
    "see the future": see_the_future,
}
