"""Random numbers: dropout is drawn alike on every rank and plan, everything else is refused."""

from __future__ import annotations

import torch
from torch import fx

from ilm_compile.errors import TraceError
from ilm_compile.program.users_line import source_of

aten = torch.ops.aten
# Tagged as random, but drawn by `seeded_dropout`, or not random without dropout.
_SEEDED = {
    *(aten.dropout.default, aten.dropout_.default, aten.native_dropout.default),
    aten.scaled_dot_product_attention.default,
}


def refuse_random(node: fx.Node, target: object) -> None:
    """Raise `TraceError` if `target`, called for `node`, draws numbers of its own."""
    if not isinstance(target, torch._ops.OpOverload) or target in _SEEDED:
        return
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise TraceError(
            f"trace: the model draws random numbers with {target} ({source_of(node)}); only "
            "dropout is drawn so that every rank and plan draws the same. Turn it off in the "
            "model's configuration, or train with it turned off"
        )
