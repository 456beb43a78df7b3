"""A collective in two halves does what it does as a whole, whichever it is."""

import pytest
import torch
from torch import Tensor

from ilm_compile.program import started
from ilm_compile.program.collectives import TRANSITIONS, wire_of
from ilm_compile.program.placement import I, P, Placement, R, S
from ilm_compile.proof.threads import run_ranks

SHAPE = (8, 16, 4)
CUTS = [S(0), S(1), S(2), S(1, (4, 12)), S(0, (4, 4))]
KINDS = {"I": [I], "R": [R], "P": [P], "S": CUTS}
ilm = torch.ops.ilm

MOVES = [
    pytest.param(src, dst, backward, id=f"{'gradient of ' * backward}{src} to {dst}")
    for kinds in TRANSITIONS
    for src in KINDS[kinds[0]]
    for dst in KINDS[kinds[1]]
    for backward in (False, True)
    if src != dst and wire_of(src, dst, backward=backward)
]


@pytest.mark.parametrize(("src", "dst", "backward"), MOVES)
def test_both_halves_are_the_whole(src: Placement, dst: Placement, backward: bool) -> None:
    ends = (str(src), str(dst), "tp", backward)
    wire = wire_of(src, dst, backward=backward)
    assert wire is not None
    given = dst if backward else src

    def rank(r: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(r)
        x = torch.randn(given.local_shape(SHAPE, 2), dtype=torch.float64)
        received = ilm.start(x, *ends)
        ilm.wait(received, x)
        whole = ilm.redistribute(x, *ends)
        return ilm.unpacked(received, *ends) if wire.is_unpacked else received, whole

    for halves, whole in run_ranks(2, rank):
        assert torch.equal(halves, whole)


def test_every_transition_that_sends_once_is_among_them() -> None:
    sent = {(param.values[0].kind, param.values[1].kind) for param in MOVES}
    names = {TRANSITIONS[pair][0] for pair in sent}
    assert {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"} <= names


def test_what_was_never_started_cannot_be_waited_for() -> None:
    with pytest.raises(KeyError):
        ilm.wait(torch.ones(2), torch.ones(2))
    assert started.__doc__
