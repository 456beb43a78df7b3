"""Whether the loss of a batch is the average of the losses of its slices, term by term.

A run averages the losses of its micro-batches and data-parallel ranks. For a mean cross entropy
that is right (`ilm_compile.program.loss`), and for any average over rows. A loss that divides by
what one micro-batch happens to count is made right: what the inputs alone decide is counted in the
whole batch before a step, and a sum over rows is multiplied by the number of slices. A term beside
such a loss that does not look at the labels, as a router's auxiliary loss, is of one micro-batch by
its nature. All else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ilm_compile.errors import IlmCompileError, PlanError
from ilm_compile.ops.call import aten, tensor_inputs
from ilm_compile.ops.spec import spec_of
from ilm_compile.program.placement import P
from ilm_compile.program.program import Program
from ilm_compile.program.slices import Use, average_sums, count_in_batch, sources
from ilm_compile.sharding.batch_axis import (
    AVERAGE,
    SAME,
    SLICES,
    Known,
    Lost,
    State,
    batch_states,
)
from ilm_compile.sharding.distinct_blocks import distinct_blocks
from ilm_compile.sharding.pieces import join_pieces
from ilm_compile.sharding.plain_loss import is_plain

ALONE = 5  # rows to trace for one: torch has other calls for one row, and no pairs fit into these
LABELS = ("label", "target")  # parts of the names of inputs that a loss compares with
_MOVED = {aten.contiguous.default, aten.clone.default}


@dataclass(frozen=True)
class Terms:
    """What keeps a loss from being an average over the rows.

    main: why the loss cannot be averaged over slices, "" if it can; beside it: of each term that is
    of one slice by nature, where and why. counts, sums: what makes it one, for `count_in_batch` and
    `average_sums`.
    """

    main: str = ""
    beside: list[str] = field(default_factory=list)
    counts: dict[Use, int] = field(default_factory=dict)
    sums: dict[Use, int] = field(default_factory=dict)


def check_loss(program: Program, *, num_slices: int) -> None:
    """Make the loss the average of that of its slices, or refuse it; warn of terms beside it.

    program: as traced, before any pass. It is traced with other numbers of rows too where one trace
    does not tell. Raises `PlanError`, with the user's line.
    """
    if num_slices == 1 or is_plain(program):
        return
    found = loss_terms(program)
    if found.main:
        raise PlanError(
            f"plan: a batch cut into {num_slices} micro-batches (num_microbatches times "
            "data-parallel ranks) trains the average of their losses; expected a loss that is the "
            f"same for the whole batch, got one that {found.main}. Write it as "
            "F.cross_entropy(logits, labels), as a sum over all tokens divided by what is counted "
            "in the labels, or as a mean over each row followed by a mean over the rows; or train "
            "with num_microbatches=1 and dp=1"
        )
    count_in_batch(program, found.counts)
    average_sums(program, found.sums)
    each = "loss: computed per micro-batch, not over the whole batch, is what"
    for why in found.beside[:1]:
        more = f"; {len(found.beside) - 1} more such terms" if len(found.beside) > 1 else ""
        program.warnings.append(f"{each} {why}{more}")


def loss_terms(program: Program) -> Terms:
    """Return the terms of the loss of `program`, from traces with two numbers of rows."""

    def traced(rows: int, **how: Any) -> Program:
        assert program.retrace is not None
        shapes = {n: replace(i, shape=(rows, *i.shape[1:])) for n, i in program.inputs.items()}
        return program.retrace(shapes, **how)

    given = next(iter(program.inputs.values())).shape[0]
    rows = given if given > 1 else ALONE
    if rows != given and (blocks := distinct_blocks(program)):
        with suppress(IlmCompileError):  # then all blocks tell
            if is_plain(traced(rows, blocks=blocks)):
                return Terms()
    try:
        part = program if rows == given else traced(rows)
        if part is not program and is_plain(part):
            return Terms()
        whole = traced(SLICES * rows)
    except IlmCompileError as error:
        first = str(error).splitlines()[0]
        return Terms(f"cannot be traced with {SLICES * rows} rows, which would tell ({first})")
    for each in (program, whole) if part is program else (program, part, whole):
        join_pieces(each)
    states, counts = batch_states(part, whole)
    labels, joints = _label_inputs(whole), set[fx.Node]()
    beside = list(_mixed_logits(whole, states))
    uses = list(_terms(whole.outputs[0], whole.graph.output_node(), states, joints))
    for node, _ in uses:
        if not _is_fine(states[node]):
            if _reads(node, labels):
                return Terms(_why(whole, node, states[node]))
            beside.append(_why(whole, node, states[node]))
    added = ((use, states[use[0]]) for use in uses)
    sums = {use: s.weight for use, s in added if isinstance(s, Known) and s.placement == P}
    if not sums:
        return Terms(next(iter(beside), "depends on no input"))
    used = sources(whole.outputs[:1], lambda n: n in joints or isinstance(states[n], Known))
    counted = {(n, user): w for n, w in counts.items() for user in n.users if user in used}
    lost = sources(n for n in sources(node for node, _ in uses) if isinstance(states[n], Lost))
    for node in (user for _, user in counted if user in lost):
        return Terms(
            "needs a number of the whole batch where a term beside it, that is of one micro-batch, "
            f"needs that of its own; compute it for each: {node.target}, {whole.where(node)}"
        )
    sums = {use: weight for use, weight in sums.items() if weight != AVERAGE.weight}
    own, needed = _twins(whole, program), sources(node for node, _ in counted)
    needed |= {node for use in (*counted, *sums) for node in use}
    for node in (n for n in whole.graph.nodes if n in needed and n not in own):
        return Terms(
            "is a sum over rows, and for one row is written in another way: give each micro-batch "
            f"two rows: {node.target}, {whole.where(node)}"
        )
    return Terms(
        beside=list(dict.fromkeys(beside)),
        counts={(own[node], own[user]): weight for (node, user), weight in counted.items()},
        sums={(own[node], own[user]): weight for (node, user), weight in sums.items()},
    )


def _twins(whole: Program, program: Program) -> dict[fx.Node, fx.Node]:
    """Return which nodes of `program` stand for those of `whole`, from the loss up to the inputs.

    As far as the two are alike: for one row torch leaves out what makes a value contiguous.
    """
    found = {whole.graph.output_node(): program.graph.output_node()}
    pending = [(whole.outputs[0], program.outputs[0])]
    while pending:
        ours, theirs = pending.pop()
        if ours.target in _MOVED and ours.target != theirs.target:
            found[ours] = theirs
            pending.append((ours.all_input_nodes[0], theirs))
        elif ours.target == theirs.target and ours not in found:
            found[ours] = theirs
            pending += zip(tensor_inputs(ours), tensor_inputs(theirs), strict=False)
    return found


def _why(program: Program, node: fx.Node, state: State) -> str:
    if isinstance(state, Lost):
        return f"{state.reason}: {state.node.target}, {program.where(state.node)}"
    return f"grows with the number of rows: {node.target}, {program.where(node)}"


def _is_fine(state: State) -> bool:
    """Whether it is the same in every slice, or a sum over them."""
    return state == SAME or (isinstance(state, Known) and state.placement == P)


def _terms(
    node: fx.Node, user: fx.Node, states: dict[fx.Node, State], joints: set[fx.Node]
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the terms whose sum with constant factors the loss is, each with what takes it.

    Adds to `joints` the calls that scale them and add them up.
    """
    state = states[node]
    if _is_fine(state):
        yield node, user
        return
    # Whether what is wrong is what this very call does.
    here = isinstance(state, Known) or node in (state.node, state.scaled)
    scales = spec_of(node.target).scales
    inputs = [n for n in tensor_inputs(node) if states[n] != SAME]
    divides = scales == "quotient" and inputs[:1] != [node.args[0]]
    is_scaled = scales and len(inputs) == 1 and inputs[0].meta["val"].dim() == 0
    if scales == "affine" or (is_scaled and not (here or divides)):
        joints.add(node)
        for term in inputs:
            yield from _terms(term, node, states, joints)
    else:
        yield node, user


def _label_inputs(program: Program) -> set[str]:
    """Return the inputs that hold labels, by their names or because targets are counted in them."""
    counted = {name for count in program.target_counts.values() for name in count.inputs}
    named = {name for name in program.inputs if any(word in name.lower() for word in LABELS)}
    return named | counted or set(program.inputs)


def _reads(node: fx.Node, inputs: set[str]) -> bool:
    """Whether a value depends on one of `inputs` other than through an embedding."""
    found = sources([node], lambda n: n.target is not aten.embedding.default)
    return any(n.op == "placeholder" and str(n.target) in inputs for n in found)


def _mixed_logits(program: Program, states: dict[fx.Node, State]) -> Iterator[str]:
    """Yield where the rows were mixed on the way to a cross entropy, each place once."""
    losses = program.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default)
    found = {s for n in losses for i in tensor_inputs(n) if isinstance(s := states[i], Lost)}
    yield from {_why(program, s.node, s): None for s in found if not s.cuts}
