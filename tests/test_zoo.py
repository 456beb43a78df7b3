"""Hugging Face's causal language models, unmodified, train the same when they are sharded."""

from __future__ import annotations

import re

import pytest

from tests.support.coverage import BOUND, cover
from tests.support.equality import Case, assert_prepared_equal
from tests.support.zoo import LISTED

pytest.importorskip("transformers")

SHARE = 0.05  # of weights and of FLOPs, that every rank may repeat
# One of each kind of block that the listed models do not have.
OTHERS = (
    *("GPTJForCausalLM", "GPTNeoForCausalLM", "GPTBigCodeForCausalLM", "PhiForCausalLM"),
    *("StableLmForCausalLM", "Starcoder2ForCausalLM", "CohereForCausalLM", "Gemma2ForCausalLM"),
    *("Gemma3ForCausalLM", "GraniteForCausalLM", "NemotronForCausalLM", "Olmo3ForCausalLM"),
    *("Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM", "GraniteMoeForCausalLM"),
    *("Llama4ForCausalLM", "MptForCausalLM", "CTRLLMHeadModel", "XGLMForCausalLM"),
    *("BertLMHeadModel", "BartForCausalLM", "BambaForCausalLM", "Mamba2ForCausalLM"),
    *("Lfm2ForCausalLM",),
)


@pytest.mark.parametrize("model", LISTED)
def test_two_processes_equal_the_single_device_model(model, prepared):
    assert_prepared_equal(prepared, 2, Case(model, {"tp": 2}), BOUND)


@pytest.mark.parametrize("plan", [{"tp": 4}, {"tp": 2, "pp": 2}], ids=["tp4", "tp2-pp2"])
@pytest.mark.parametrize("model", LISTED)
def test_four_processes_equal_the_single_device_model(model, plan, prepared):
    assert_prepared_equal(prepared, 4, Case(model, plan), BOUND)


@pytest.mark.parametrize("architecture", OTHERS)
def test_further_architectures_are_equal_and_divided(architecture):
    found = cover(architecture, [2])
    assert found.outcome == "equal", found.reason
    assert found.sharded[0].weights < SHARE
    assert found.sharded[0].flops < SHARE


REFUSED = {
    "DbrxForCausalLM": "asks where a condition holds .*modeling_dbrx.py:",
    "JetMoeForCausalLM": "reads a number out of a tensor .*modeling_jetmoe.py",
    "PhimoeForCausalLM": "draws random numbers",
    "Gemma3nForCausalLM": "changes the .data of a value",
}


@pytest.mark.parametrize(("architecture", "reason"), REFUSED.items(), ids=list(REFUSED))
def test_what_no_graph_can_hold_is_refused_with_a_reason(architecture, reason):
    found = cover(architecture, [2])
    assert found.outcome == "refused"
    assert re.search(reason, found.reason), found.reason
