"""Batches that reach every corner of a program: what each input means is read from the graph.

Token ids and labels cover their whole range; labels are ignored in the first and last column,
between, and in whole rows; positions begin anew at each document; a mask hides tokens inside a row
and at its end; documents end at other places in each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx

from ilm_compile.program.dropout import SEED
from ilm_compile.program.loss import cross_entropy_arguments
from ilm_compile.program.program import Input, Program
from ilm_compile.program.values import tensors_of
from ilm_compile.proof.dims import op_name
from ilm_compile.proof.marks import place_marks

aten = torch.ops.aten
LEVELS = ("every corner", "no whole row without targets", "all labels are targets", "plain")
COUNT = 1027.375  # of targets in a micro-batch: bfloat16 cannot hold it
# Ops through which a token id or a label stays one.
CARRIERS = {
    *("reshape", "slice", "select", "transpose", "to", "contiguous", "clone", "unsqueeze"),
    *("masked_fill", "where", "cat", "pad", "constant_pad_nd", "new_full", "copy", "squeeze"),
    *("clamp", "clamp_min", "detach", "redistribute", "roll", "expand", "permute", "slice_scatter"),
}


@dataclass(frozen=True, slots=True)
class Role:
    """What an integer input is: numbers below `high`; `ignored` marks what is no target."""

    high: int
    ignored: int | None = None


def roles(program: Program) -> dict[str, Role]:
    """Return the role of each integer input that looks something up or is a target."""
    found = {}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.target in program.inputs and not node.meta["val"].is_floating_point():
            uses = list(_uses(node))
            highs = [high for high, _ in uses]
            ignored = [i for _, i in uses if i is not None]
            if highs:
                found[str(node.target)] = Role(min(highs), ignored[0] if ignored else None)
    return found


def _uses(node: fx.Node) -> Iterator[tuple[int, int | None]]:
    """Yield (number of rows or classes, ignored label) of each lookup that `node` leads to."""
    pending, known = [node], {node}
    while pending:
        current = pending.pop()
        for user in current.users:
            if user.op != "call_function":
                continue
            name, arguments = op_name(user), list(user.args)
            if name in ("embedding", "vocab_embedding") and arguments[1] is current:
                yield _size(arguments[0], 0), None
            elif name in ("cross_entropy_loss", "nll_loss_nd") and arguments[1] is current:
                yield _size(arguments[0], 1), cross_entropy_arguments(user)[2]
            elif name == "gather" and arguments[2] is current:
                yield _size(arguments[0], cast(int, arguments[1])), None
            elif name == "one_hot":
                yield int(user.meta["val"].shape[-1]), None
            elif name in CARRIERS and user not in known:
                known.add(user)
                pending.append(user)


def lookups(program: Program) -> Iterator[tuple[fx.Node, int, bool]]:
    """Yield (table or logits, its dimension of rows or classes, whether inputs alone pick there).

    Where the inputs alone pick, as with token ids and labels, there may be fewer rows.
    """
    for node in program.calls():
        name = op_name(node, whole=True)
        if name == "embedding":
            yield node.all_input_nodes[0], 0, _is_input(node.args[1], program)  # type: ignore[arg-type]
        elif name == "cross_entropy_loss":
            logits = node.all_input_nodes[0]
            dim = min(1, logits.meta["val"].dim() - 1)
            yield logits, dim, _is_input(node.args[1], program)  # type: ignore[arg-type]
        elif name == "linear_cross_entropy":
            yield node.all_input_nodes[1], 0, _is_input(node.all_input_nodes[2], program)


def _is_input(node: fx.Node, program: Program) -> bool:
    """Whether `node` is an integer input, moved about."""
    pending, known, found = [node], {node}, False
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            found = True
        elif current.op == "get_attr" or (
            op_name(current) not in CARRIERS and current.all_input_nodes
        ):
            return False
        elif op_name(current) == "arange":
            return False
        pending += [n for n in current.all_input_nodes if n not in known]
        known.update(current.all_input_nodes)
    return found


def _size(node: object, dim: int) -> int:
    assert isinstance(node, fx.Node)
    shape = node.meta["val"].shape
    return int(shape[dim if len(shape) > dim else -1])


def corner_batch(
    program: Program, count: int, *, level: int = 0, seed: int = 0
) -> dict[str, Tensor]:
    """Return `count` micro-batches; a higher `level` of `LEVELS` leaves corners out."""
    generator = torch.Generator().manual_seed(seed)
    known = roles(program)
    length = _length(program)
    batch = {
        name: _values(name, spec, known.get(name), count, length, level, generator)
        for name, spec in program.inputs.items()
    }
    place_marks(program, batch)
    return batch


def _length(program: Program) -> int:
    """Return the tokens of a row: the longest input's, boundaries aside (they may be more)."""
    shapes = {name: spec.shape[1:] for name, spec in program.inputs.items()}
    tokens = [n for name, shape in shapes.items() if name != "cu_seqlens" for n in shape]
    return max(tokens or [n for shape in shapes.values() for n in shape], default=1)


def _values(
    name: str,
    spec: Input,
    role: Role | None,
    count: int,
    length: int,
    level: int,
    generator: torch.Generator,
) -> Tensor:
    shape = (spec.shape[0] * count, *spec.shape[1:])
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    plain = level == len(LEVELS) - 1
    if name == "cu_seqlens":
        return _boundaries(shape, length, spec.dtype)
    if name == "position_ids":
        return _positions(shape, role.high if role else length, plain).to(spec.dtype)
    if name.endswith("attention_mask") or spec.dtype == torch.bool:
        return _mask(shape, plain, generator).to(spec.dtype)
    high = role.high if role else 2
    values = torch.randint(0, high, shape, generator=generator, dtype=torch.int64)
    flat = values.view(-1)
    flat[-1], flat[0] = 0, high - 1  # the ends of the range are in it
    if role and role.ignored is not None and level < 2:
        _ignore(values, role.ignored, whole_rows=level < 1)
    return values.to(spec.dtype)


def _ignore(labels: Tensor, ignored: int, *, whole_rows: bool) -> None:
    """Mark labels as no targets: other columns in each row, and some whole rows."""
    if labels.dim() == 1:
        labels[1::3] = ignored if len(labels) > 1 else labels[1::3]
        return
    for row, columns in enumerate(labels):
        n = columns.shape[-1]
        pattern = row % 5
        if pattern in (0, 4):
            columns[..., : n // 3] = ignored
        if pattern in (0, 1):
            columns[..., n - 1 :] = ignored
        if pattern == 2:
            columns[..., 1::3] = ignored
        if pattern == 3 and whole_rows:
            columns[:] = ignored


def _mask(shape: tuple[int, ...], plain: bool, generator: torch.Generator) -> Tensor:
    """Return ones, with holes inside each row and an end of other length; the first token shows."""
    mask = torch.ones(shape, dtype=torch.int64)
    if plain or len(shape) < 2 or shape[-1] < 4:
        return mask
    mask[torch.rand(shape, generator=generator) < 0.1] = 0
    for row in range(0, shape[0], 2):
        mask[row, ..., shape[-1] - 1 - (row + 1) % (shape[-1] // 2) :] = 0
    mask[..., 0] = 1
    return mask


def _positions(shape: tuple[int, ...], high: int, plain: bool) -> Tensor:
    """Return positions that begin anew at each document."""
    length = shape[-1]
    ramp = torch.arange(length).expand(shape).contiguous()
    rows = ramp.view(-1, length)
    for row, columns in enumerate([] if plain else rows):
        start = (_starts(length, row) or [length])[-1]
        columns[start:] -= start
    return ramp.clamp_(max=high - 1)


def _boundaries(shape: tuple[int, ...], length: int, dtype: torch.dtype) -> Tensor:
    """Return where documents start: several in each row, of other lengths in each."""
    if len(shape) == 1:
        return torch.tensor([0, *[length] * (shape[0] - 1)], dtype=dtype)
    rows = []
    for row in range(shape[0]):
        starts = [0, *_starts(length, row)][: shape[1] - 1]
        rows.append(starts + [length] * (shape[1] - len(starts)))
    return torch.tensor(rows, dtype=dtype)


def _starts(length: int, row: int) -> list[int]:
    """Return where the documents of a row start but the first.

    In every second row the last one is nearly all of it: a window of attention shows only in a
    document that is longer.
    """
    long, short = {1, 2}, {(length // 3 + row) % length, (2 * length // 3 + 2 * row) % length}
    return sorted(start for start in (short if row % 2 else long) if 0 < start < length)


def microbatch(program: Program, batch: dict[str, Tensor], index: int = 0) -> dict[str, Tensor]:
    """Return one micro-batch of `batch`, with what the compiler added: target counts, seeds."""
    values = {
        name: batch[name].narrow(0, spec.shape[0] * index, spec.shape[0])
        for name, spec in program.inputs.items()
    }
    for node in program.graph.find_nodes(op="placeholder"):
        if node.target not in values:
            (val,) = tensors_of(node.meta["val"])
            number = 7 if node.target == SEED else COUNT
            values[str(node.target)] = torch.full(val.shape, number, dtype=val.dtype)
    return values
