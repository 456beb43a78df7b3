"""Sizes made smaller in both graphs: what remains is a program, its regions equal, faults seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ilm_compile
from ilm_compile.errors import PlanError
from ilm_compile.models import internlm2_tiny, internlm_tiny
from ilm_compile.passes import lower, wrap
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.proof import fit
from ilm_compile.proof.smaller import Change
from ilm_compile.proof.subject import Subject
from ilm_compile.proof.values import check_values

EXAMPLE = {name: ((1, 256), torch.int64) for name in ("input_ids", "labels")}
SIZES = {"hidden_size": 512, "num_attention_heads": 16, "vocab_size": 2003, "num_layers": 2}


def hugging_face(kind: str, **config: Any) -> Callable[[], nn.Module]:
    import transformers

    given = {**SIZES, "num_hidden_layers": 2, "intermediate_size": 1024, **config}
    given.pop("num_layers")
    made = getattr(transformers, f"{kind}Config")(**given, pad_token_id=0)
    return lambda: transformers.AutoModelForCausalLM.from_config(made)


EXPERTS = {"num_key_value_heads": 8, "num_experts_per_tok": 2}
GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, Callable[[], Callable[[], nn.Module]]] = {
    "InternLM": lambda: lambda: internlm_tiny(**SIZES),
    "InternLM2": lambda: lambda: internlm2_tiny(**SIZES, num_kv_attention_heads=8),
    "Llama": lambda: hugging_face("Llama", num_key_value_heads=8),
    "GPT-2": lambda: hugging_face("GPT2", **GPT2),
    "Mixtral": lambda: hugging_face("Mixtral", **EXPERTS, num_local_experts=4),
    "Qwen3-MoE": lambda: hugging_face(
        "Qwen3Moe", **EXPERTS, num_experts=8, moe_intermediate_size=256, head_dim=32
    ),
    "Gemma-2": lambda: hugging_face("Gemma2", num_key_value_heads=8, head_dim=32),
    "Phi-3": lambda: hugging_face("Phi3", num_key_value_heads=8),
    "BLOOM": lambda: hugging_face("Bloom", hidden_dropout=0.0, attention_dropout=0.0),
}


@dataclass
class Reduced:
    """A model on the meta device, its graphs, and both again at sizes made smaller."""

    traced: Program
    program: Program
    small: fit.Fit


def reduced(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    example: dict[str, Any] = EXAMPLE,
    **plan: Any,
) -> Reduced:
    if name not in ("InternLM", "InternLM2"):
        pytest.importorskip("transformers")
    build = MODELS[name]()
    with torch.device("meta"):
        model = build()
    traced = trace(model, example_inputs=example)
    program = ilm_compile.partition(model, example_inputs=example, **plan)
    monkeypatch.setattr(fit, "SECONDS", 0.5)
    return Reduced(traced, program, Subject(traced, program).fit_pieces())


@pytest.mark.parametrize("name", MODELS)
def test_a_smaller_program_is_one_and_its_regions_are_equal(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reduced(name, monkeypatch, tp=2)
    assert "sizes reduced" in found.small.note
    for program in (found.small.traced, found.small.program):
        check_values(program)
    lower(found.small.program)
    _, compared = Subject(found.small.traced, found.small.program).regions()
    errors = [(piece.region, each.is_finite, each.largest) for piece, each, _ in compared]
    assert len(errors) >= 3
    assert all(is_finite and error < 1e-10 for _, is_finite, error in errors), errors


@pytest.mark.parametrize("attention", ["heads", "queries", "ring"])
def test_boundaries_of_documents_are_those_of_fewer_tokens(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("input_ids", "labels", "position_ids")
    documents = {name: ((1, 4096), torch.int64) for name in names}
    documents["cu_seqlens"] = ((1, 9), torch.int32)
    found = reduced("InternLM2", monkeypatch, documents, cp=2, cp_attention=attention)
    assert found.small.program.inputs["input_ids"].shape[1] < 4096
    check_values(found.small.program)
    _, compared = Subject(found.small.traced, found.small.program).regions()
    errors = [each.largest for _, each, _ in compared]
    assert len(errors) >= 3
    assert max(errors) < 1e-10


@pytest.mark.parametrize("name", ["InternLM2", "Llama", "Mixtral"])
def test_a_fault_of_the_program_is_seen_at_smaller_sizes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reduced(name, monkeypatch, tp=2)
    node = [n for n in found.program.calls() if "silu" in n.name][-1]
    wrap(found.program, node, lambda x: x * 1.0001)
    found.program.finish()
    fitted, compared = Subject(found.traced, found.program).regions()
    assert not fitted.is_own_size
    wrong = [locate(1e-10) for _, each, locate in compared if not each.largest < 1e-10]
    assert [each is not None and each.what for each in wrong] == ["value"]


def test_nothing_is_made_smaller_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = reduced("InternLM2", monkeypatch)
    monkeypatch.setattr(fit, "SECONDS", 1e9)
    whole = Subject(found.traced, found.program).fit_pieces()
    assert whole.is_own_size
    assert whole.program is found.program


def test_a_program_that_cannot_be_made_small_enough_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = reduced("InternLM2", monkeypatch)
    monkeypatch.setattr(fit, "SECONDS", 1e-9)
    with pytest.raises(PlanError, match="too large to be run here"):
        Subject(found.traced, found.program).fit_pieces()


class Counting(nn.Module):
    """Divides by what it counts in the labels: targets, and class weights of targets."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(512, 32), nn.Linear(32, 512)
        self.register_buffer("weight", torch.linspace(0.5, 1.5, 512))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        scores, targets = self.head(self.embed(input_ids)).flatten(0, 1), labels.flatten()
        weighed = F.cross_entropy(scores, targets, weight=self.weight)
        total = F.cross_entropy(scores, targets, reduction="sum")
        return weighed + total / (labels.reshape(-1) != -100).sum()


def test_what_a_loss_counts_has_smaller_sizes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "SECONDS", 1e-3)
    model = Counting().double()
    report = ilm_compile.verify(model, num_microbatches=2, example_inputs=EXAMPLE)
    report.raise_if_failed()
    (step,) = (check for check in report.checks if check.name == "step")
    assert "sizes reduced" in step.detail


@pytest.mark.parametrize(
    ("change", "size", "expected"),
    [
        (Change(by=4), 64, 16),
        (Change(less=40), 64, 24),
        (Change(less=40), 0, 0),
        (Change(less=40, kept=1), 1, 1),
        (Change(less=40, kept=1), 63, 23),
    ],
)
def test_what_a_change_makes_of_a_size(change: Change, size: int, expected: int) -> None:
    assert change.of(size) == expected
