"""The traced graph beside the model itself: equal for models as people write them, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

import ilm_compile
from ilm_compile import prove
from ilm_compile.program.copy import copy_program
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.proof import zoo
from tests.proof.small import INPUTS, make_model
from tests.proof.test_right_programs import NoConfig


class Logits(nn.Module):
    """Gives logits; keeps its head in a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(zoo.VOCAB, zoo.HIDDEN)
        self.inner = nn.Linear(zoo.HIDDEN, zoo.HIDDEN)
        head = self.embed.weight
        self.head = lambda x: F.linear(x, head)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.inner(self.embed(input_ids))))


def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def replaced() -> nn.Module:
    model = make_model("internlm2")
    model.norm = nn.LayerNorm(zoo.HIDDEN).double()
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "changed after construction": (replaced, {}),
    "a loss function and a closure": (lambda: Logits().double(), {"loss_fn": loss_fn}),
    "a loss left behind": (lambda: zoo.make_model(NoConfig), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_the_model(name: str) -> None:
    build, keywords = CASES[name]
    report = ilm_compile.verify(build(), example_inputs=INPUTS, tp=2, **keywords)
    capture = report.checks[1]
    assert (capture.name, capture.ok) == ("capture", True), str(report)
    assert "not run" not in capture.detail


def test_a_graph_that_is_not_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **keywords: Any) -> Program:
        program = copy_program(trace(*arguments, **keywords))
        node = next(n for n in program.calls() if n.name == "rms_norm_1")
        node.args = (*node.args[:3], 1e-3)
        program.finish()
        return program

    monkeypatch.setattr(prove, "trace", wrong)
    report = ilm_compile.verify(make_model("internlm2"), example_inputs=INPUTS)
    assert [check.name for check in report.checks if not check.ok] == ["capture"]
    assert "capture: the traced graph is not equal to the model" in report.failures[0]


def test_a_model_too_large_to_run_is_said_to_be_unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "fits_whole", lambda traced, slices: False)
    report = ilm_compile.verify(make_model("internlm2"), example_inputs=INPUTS)
    assert report.ok
    assert report.checks[1].detail.startswith("not run: the model is too large here")
