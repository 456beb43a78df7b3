"""Head and tail pieces in the search: whether to fold is one decision for a whole program.

A value may be cut once, or folded (`ilm_compile.program.placement`); the rules allow both and treat
them alike. Between the two lies an all-gather, so a program has one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ilm_compile.ops.call import Strategy
from ilm_compile.program.placement import Placement


def one_fold(options: Sequence[Strategy], *, is_folded: bool) -> list[Strategy]:
    """Return the options that fold as the program does; what cannot be folded is cut once."""
    if not is_folded:
        return [option for option in options if cut_once(option) == option]
    offered = set(options)
    return [o for o in options if _refold(o, True) == o or _refold(o, True) not in offered]


def cut_once(option: Strategy) -> Strategy:
    """Return the same strategy with nothing folded."""
    return _refold(option, False)


def _refold(option: Strategy, folded: bool) -> Strategy:
    def of(placement: Placement) -> Placement:
        return replace(placement, folded=folded) if placement.kind in "ST" else placement

    return Strategy(tuple(map(of, option.inputs)), of(option.output))
