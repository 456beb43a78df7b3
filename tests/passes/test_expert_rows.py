"""An order of rows by experts is named where all its uses are known, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ilm_compile

VOCAB, HIDDEN, EXPERTS, TOP, ROWS, SEQ = 32, 8, 4, 2, 2, 8
EXAMPLE = {name: ((ROWS, SEQ), torch.int64) for name in ("input_ids", "labels")}
Inverse = Callable[[Tensor], Tensor]


def by_writing(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return inverse


class Experts(nn.Module):
    """A mixture of experts as people write it, and what they may do to the order besides."""

    def __init__(self, inverse: Inverse = torch.argsort, extra: str = "") -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.weight = nn.Parameter(0.3 * torch.randn(EXPERTS, HIDDEN, HIDDEN))
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.inverse, self.extra = inverse, extra

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids).flatten(0, 1)
        gates, chosen = self.router(x).softmax(-1).topk(TOP)
        ids = chosen.flatten()
        order = ids.argsort()
        rows = x[order // TOP]
        if self.extra == "positions":  # of rows among all: no rank knows them alone
            rows = rows + order.unsqueeze(-1) / (ROWS * SEQ * TOP)
        if self.extra == "another order":
            rows = rows + gates.flatten()[ids.flip(0).argsort()].unsqueeze(-1)
        ends = torch.histc(ids[order].float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32)
        made = F.silu(torch.ops.transformers.grouped_mm_fallback(rows, self.weight, ends))
        if self.extra == "mask":  # as transformers clears rows of experts that are elsewhere
            made = made.masked_fill(ids[order].unsqueeze(-1) >= EXPERTS, 0.0)
        back = (made * gates.flatten()[order].unsqueeze(-1))[self.inverse(order)]
        x = x + back.unflatten(0, (-1, TOP)).sum(1)
        return F.cross_entropy(self.head(x), labels.flatten())


def calls(program: ilm_compile.Program) -> list[str]:
    return [str(getattr(n.target, "__name__", n.target)) for n in program.calls()]


def make(**options: object) -> Experts:
    pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)
    return Experts(**options).double()  # type: ignore[arg-type]


OWN = {"argsort": {}, "index_put": {"inverse": by_writing}, "a mask of rows": {"extra": "mask"}}


@pytest.mark.parametrize("options", OWN.values(), ids=OWN)
def test_rows_of_a_models_own_experts_are_dispatched(options):
    model = make(**options)
    program = ilm_compile.partition(model, example_inputs=EXAMPLE, ep=2)
    assert {"expert_order", "sort_rows", "unsort_rows", "route"} <= set(calls(program))
    assert program.variables["weight"].layout.text(["ep"]) == "S(0)"
    assert "expert-parallel: in 1 layers rows of experts" in "\n".join(program.decisions)
    ilm_compile.verify(model, example_inputs=EXAMPLE, ep=2).raise_if_failed()


@pytest.mark.parametrize("dispatch", [True, False])
def test_how_rows_meet_their_experts_can_be_forced(dispatch):
    model = make()
    program = ilm_compile.partition(model, example_inputs=EXAMPLE, ep=2, dispatch=dispatch)
    moves = {str(n.kwargs["dst"])[0] for n in program.calls() if calls_route(n)}
    assert moves == ({"T", "D"} if dispatch else {"E", "P"})
    ilm_compile.verify(model, example_inputs=EXAMPLE, ep=2, dispatch=dispatch).raise_if_failed()


def calls_route(node: torch.fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "route"


@pytest.mark.parametrize("extra", ["positions", "another order"])
def test_an_order_with_a_use_that_no_rank_knows_alone_keeps_its_name(extra):
    model = make(extra=extra)
    program = ilm_compile.partition(model, example_inputs=EXAMPLE, ep=2)
    assert "expert_order" not in calls(program)
    ilm_compile.verify(model, example_inputs=EXAMPLE, ep=2).raise_if_failed()
