"""What a fused op takes of the host beside a plain op: `python -m benchmarks.op_host_cost`.

Four ways to the same work, a copy of one small tensor: an op of torch, an autograd.Function called
as it is, an op whose backward `torch.library.register_autograd` binds, and one whose backward our
`differentiable` binds, as every fused op's is. Microseconds of processor time of this thread, the
median of many rounds in turn, forward alone and with backward; ratios are to the plain op.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import RESULTS, make_console, make_parser, save_json
from ilm_compile.kernels.library import differentiable

SCHEMA = "(Tensor x, Tensor weight, float eps, bool cast=False, float offset=0.0) -> Tensor"
OPTIONS = (1e-5, True, 1.0)
PLAIN, FUNCTION, TORCH, OURS = "plain op", "autograd.Function", "register_autograd", "fused op"


def _forward(x: Tensor, weight: Tensor, eps: float, cast: bool, offset: float) -> Tensor:
    return x.clone()


def _backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return grad.clone(), weight.clone()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.options = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.ilm.host_probe_backward(grad, *ctx.saved_tensors), None, None, None


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, inputs[0])
        return _forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(grad, *ctx.saved_tensors), None, None, None


def _define() -> None:
    for name in ("host_probe_torch", "host_probe"):
        torch.library.define(f"ilm::{name}", SCHEMA)
        torch.library.impl(f"ilm::{name}", "cpu", _forward)
    torch.library.define(
        "ilm::host_probe_backward", "(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)"
    )
    torch.library.impl("ilm::host_probe_backward", "cpu", _backward)
    torch.library.register_autograd("ilm::host_probe_torch", _differentiate, setup_context=_save)
    differentiable("ilm::host_probe", _save, _differentiate)


_define()
WAYS: dict[str, Callable[..., Tensor]] = {
    PLAIN: lambda x, weight, *_: torch.ops.aten.mul.Tensor(x, weight),
    FUNCTION: _Function.apply,
    TORCH: torch.ops.ilm.host_probe_torch.default,
    OURS: torch.ops.ilm.host_probe.default,
}


@dataclass(frozen=True)
class Row:
    """One way; microseconds of a call, and how many times the plain op's."""

    way: str
    forward_us: float
    both_us: float
    forward_ratio: float
    both_ratio: float


def measure(*, rounds: int = 30, calls: int = 200) -> list[Row]:
    """The rows of the table, the plain op first."""
    x, weight = (torch.randn(4, requires_grad=True) for _ in range(2))
    grad = torch.ones(4)

    def forward(way: str) -> None:
        WAYS[way](x, weight, *OPTIONS)

    def both(way: str) -> None:
        torch.autograd.grad(WAYS[way](x, weight, *OPTIONS), (x, weight), grad)

    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds + 1):
        for way in WAYS:
            for run in (forward, both):
                start = time.thread_time()
                for _ in range(calls):
                    run(way)
                spent = (time.thread_time() - start) / calls * 1e6
                times.setdefault((way, run is both), []).append(spent)
    found = {key: median(each[1:]) for key, each in times.items()}  # the first round warms up
    plain = found[PLAIN, False], found[PLAIN, True]
    return [
        Row(way, ahead, back, ahead / plain[0], back / plain[1])
        for way in WAYS
        for ahead, back in [(found[way, False], found[way, True])]
    ]


def main() -> None:
    parser = make_parser("op_host_cost", __doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rows = measure(rounds=parser.parse_args().rounds)
    table = Table("way", "forward us", "x", "with backward us", "x")
    for row in rows:
        figures = (row.forward_us, row.forward_ratio, row.both_us, row.both_ratio)
        table.add_row(row.way, *(f"{figure:.1f}" for figure in figures))
    make_console().print(table)
    save_json(RESULTS / "op_host_cost.json", {"rows": rows})


if __name__ == "__main__":
    main()
