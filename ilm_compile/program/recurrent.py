"""Recurrent layers, written out step by step: what nn.LSTM, nn.GRU and nn.RNN compute.

Their fused ops return several tensors, draw their own dropout and have a kernel per device. As
ordinary ops they are traced, sharded and differentiated like everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ilm_compile.errors import TraceError
from ilm_compile.program.users_line import users_line

MAX_STEPS = 1024  # of one layer: each step is about ten nodes
State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, list[Tensor]], State]  # the input's share comes computed


class UnrolledRecurrence(TorchFunctionMode):
    """While active, runs recurrent layers as ordinary ops."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cell = _CELLS.get(getattr(func, "__name__", ""))
        if cell is None or not isinstance(args[0], Tensor):
            return func(*args, **(kwargs or {}))
        if isinstance(args[3], (list, tuple)):
            raise TraceError(
                f"trace: a packed sequence goes through a recurrent layer{users_line()}; its "
                "shapes depend on values. Give it the padded batch"
            )
        return _run(func.__name__, cell, *args, **(kwargs or {}))


def _run(
    name: str,
    cell: Cell,
    x: Tensor,
    initial: Any,
    weights: list[Tensor],
    has_bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    states = tuple(initial) if name == "lstm" else (initial,)
    steps = x.transpose(0, 1) if batch_first else x
    if len(steps) > MAX_STEPS:
        raise TraceError(
            f"trace: {name} over {len(steps)} tokens{users_line()} would be {len(steps)} steps in "
            f"the graph; up to {MAX_STEPS} are unrolled. Shorten the sequence"
        )
    directions = 1 + bidirectional
    each = len(weights) // (num_layers * directions)
    last: list[State] = []
    for layer in range(num_layers):
        if layer and dropout and training:
            steps = F.dropout(steps, dropout, training=True)
        outputs = []
        for backward in range(directions):
            index = layer * directions + backward
            own = weights[index * each : (index + 1) * each]
            state = tuple(s[index] for s in states)
            made, final = _layer(cell, steps, state, own, has_bias, bool(backward))
            outputs.append(made)
            last.append(final)
        steps = torch.cat(outputs, -1) if bidirectional else outputs[0]
    result = steps.transpose(0, 1) if batch_first else steps
    return result, *(torch.stack(kind) for kind in zip(*last, strict=True))


def _layer(
    cell: Cell, steps: Tensor, state: State, own: list[Tensor], has_bias: bool, backward: bool
) -> tuple[Tensor, State]:
    """Return the outputs of one direction of one layer, and its last state."""
    w_input, w_hidden, *rest = own
    b_input, b_hidden = rest[:2] if has_bias else (None, None)
    projection = rest[2 if has_bias else 0 :]
    projected = F.linear(steps, w_input, b_input).unbind(0)
    outputs: list[Tensor] = []
    for step in reversed(projected) if backward else projected:
        state = cell(step, state, [F.linear(state[0], w_hidden, b_hidden), *projection])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backward else outputs), state


def _lstm(x: Tensor, state: State, hidden: list[Tensor]) -> State:
    enter, forget, value, leave = (x + hidden[0]).chunk(4, -1)
    memory = forget.sigmoid() * state[1] + enter.sigmoid() * value.tanh()
    out = leave.sigmoid() * memory.tanh()
    return (F.linear(out, hidden[1]) if len(hidden) > 1 else out), memory


def _gru(x: Tensor, state: State, hidden: list[Tensor]) -> State:
    reset, update, new = x.chunk(3, -1)
    h_reset, h_update, h_new = hidden[0].chunk(3, -1)
    update = (update + h_update).sigmoid()
    new = (new + (reset + h_reset).sigmoid() * h_new).tanh()
    return ((1 - update) * new + update * state[0],)


_CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda x, state, hidden: ((x + hidden[0]).tanh(),),
    "rnn_relu": lambda x, state, hidden: ((x + hidden[0]).relu(),),
}
