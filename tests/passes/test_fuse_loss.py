"""Heads whose loss is fused with them: where, where not, and that nobody misses the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ilm_compile
from ilm_compile.passes import FuseLoss
from ilm_compile.program import linear_loss
from ilm_compile.program.program import Program
from ilm_compile.runtime.evaluation import evaluate
from ilm_compile.runtime.observe.saved import SavedBytes
from tests.support.equality import EXAMPLE, ROWS, SEQ, VOCAB, make_batch, make_model

FUSED = {"passes": [FuseLoss()], "kernels": "torch"}


class Model(nn.Module):
    """Blocks of one product and a head; `loss` makes the loss from hidden states."""

    def __init__(self, loss: Callable[[nn.Linear, Tensor, Tensor], Tensor], bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, VOCAB, bias=bias)
        self.loss = loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return {"loss": self.loss(self.head, x, labels)}


def fused(loss: Callable[..., Tensor], *, bias: bool = False, **plan: Any) -> Program:
    torch.manual_seed(0)
    return ilm_compile.partition(Model(loss, bias), example_inputs=EXAMPLE, **FUSED, **plan)


def is_fused(program: Program) -> bool:
    return any(node.target is linear_loss.linear_cross_entropy for node in program.calls())


def plain(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(x).flatten(0, 1), labels.flatten())


def shifted(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    logits = head(x).float()[:, :-1].contiguous()
    return F.cross_entropy(logits.view(-1, VOCAB), labels[:, 1:].flatten(), label_smoothing=0.1)


def with_z_loss(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    logits = head(x).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten()) + logits.logsumexp(-1).square().mean()


def capped(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(head(x)).flatten(0, 1), labels.flatten())


def weighted(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(x).flatten(0, 1), labels.flatten(), torch.ones(VOCAB))


def turned(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(x).transpose(1, 2), labels)


def cut(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(x)[..., : VOCAB // 2].flatten(0, 1), labels.flatten() // 2)


@pytest.mark.parametrize("loss", [plain, shifted])
@pytest.mark.parametrize("plan", [{}, {"dtype": torch.bfloat16}], ids=["float32", "bf16"])
def test_a_product_and_its_cross_entropy_are_one(
    loss: Callable[..., Tensor], plan: dict[str, Any]
) -> None:
    program = fused(loss, **plan)
    assert is_fused(program)
    assert "fuse-loss: 1 linear_cross_entropy in the place of plain calls" in program.decisions


@pytest.mark.parametrize(
    ("loss", "bias", "reason"),
    [
        (plain, True, "its head has a bias"),
        (with_z_loss, False, "its logits are also read by aten.logsumexp"),
        (capped, False, "its logits come from aten.tanh"),
        (weighted, False, "its classes have weights"),
        (turned, False, "its logits come from aten.transpose"),
        (cut, False, "its logits are cut or turned along their classes"),
    ],
)
def test_others_are_left_alone_with_the_reason(
    loss: Callable[..., Tensor], bias: bool, reason: str
) -> None:
    program = fused(loss, bias=bias)
    assert not is_fused(program)
    assert any(d.startswith("fuse-loss") and reason in d for d in program.decisions)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("internlm2", {"tp": 2, "sequence_parallel": True}),
        ("internlm2", {"cp": 2, "num_microbatches": 2}),
        ("gpt2", {"tp": 2, "pp": 2, "dtype": torch.bfloat16}),  # tied, on two stages
    ],
)
def test_plans_with_it_are_proven_chunk_by_chunk(
    monkeypatch: pytest.MonkeyPatch, name: str, plan: dict[str, Any]
) -> None:
    monkeypatch.setattr(linear_loss, "CHUNK", 5 * VOCAB)
    model = make_model(name)
    model = model.float() if "dtype" in plan else model
    report = ilm_compile.verify(model, example_inputs=EXAMPLE, **FUSED, **plan)
    report.raise_if_failed()
    assert report.max_grad_error < 1e-10


def parallel_of(name: str, **plan: Any) -> ilm_compile.Parallel:
    return ilm_compile.parallelize(make_model(name).float(), example_inputs=EXAMPLE, **plan)


def test_logits_are_there_for_who_asks() -> None:
    ours, theirs = parallel_of("internlm2", **FUSED), parallel_of("internlm2")
    batch = make_batch(ROWS)
    loss = theirs.execute_schedule(batch)
    for _ in range(2):  # asked for in between
        torch.testing.assert_close(ours.execute_schedule(batch), loss)
        found, expected = (
            p.execute_schedule(batch, return_output_label=True) for p in (ours, theirs)
        )
        torch.testing.assert_close(found, expected)
    assert found[0].shape == (ROWS * SEQ, VOCAB)


def test_evaluation_sees_every_token() -> None:
    plans: tuple[dict[str, Any], ...] = (FUSED, {})
    ours, theirs = (evaluate(parallel_of("gpt2", **plan), [make_batch(ROWS)]) for plan in plans)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("name", ["internlm2", "gpt2"])  # gpt2: the weight is read uncast too
def test_what_is_saved_does_not_grow_with_the_vocabulary(name: str) -> None:
    parallel = parallel_of(name, **FUSED, dtype=torch.bfloat16)
    saved = SavedBytes(parallel.stages)
    saved.start()
    parallel.execute_schedule(make_batch(ROWS))
    saved.stop()
    tokens, hidden = ROWS * SEQ, 64
    # Hidden states before and after the last norm in float32 at most, labels, a number a token.
    assert saved.bytes[0]["epilogue"] < tokens * (3 * 4 * hidden + 8 + 16)
    assert saved.bytes[0]["epilogue"] < 2 * tokens * VOCAB
