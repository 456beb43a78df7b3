"""What the mutation benchmark breaks: models of many kinds, each under some plans.

Sizes are tiny, but sequences are longer than any window that a fault puts in, and where positions
are rounded they pass 256, the last integer before bfloat16 has gaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilm_compile.models import internlm2_tiny, internlm_tiny
from ilm_compile.passes import run_passes, standard_passes
from ilm_compile.program.copy import copy_program
from ilm_compile.program.plan import Plan
from ilm_compile.program.trace import trace
from ilm_compile.proof import zoo
from ilm_compile.proof.mutations import Trial
from ilm_compile.schedule import schedule_of
from tests.support.zoo import small_model

ROWS, SEQ, LONG = 2, 24, 264
VOCAB, HIDDEN, HEADS, LAYERS = 96, 32, 4, 2
OURS = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_seq_len": SEQ,
}
Inputs = dict[str, tuple[tuple[int, ...], torch.dtype]]
TP, SP, PP = {"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"pp": 2, "num_microbatches": 3}
BF16 = {"tp": 2, "dtype": "bfloat16"}


def tokens(*further: str, seq: int = SEQ) -> Inputs:
    """Return ids, labels and inputs like them."""
    shape = (ROWS if seq == SEQ else 1, seq)
    return {name: (shape, torch.int64) for name in ("input_ids", "labels", *further)}


def documents() -> Inputs:
    """Return ids, labels and the boundaries of up to four documents."""
    return {**tokens(), "cu_seqlens": ((ROWS, 5), torch.int32)}


@dataclass(frozen=True)
class Case:
    """A model, what it takes, and the plans under which it is broken."""

    build: Callable[[], nn.Module]
    plans: tuple[dict[str, Any], ...] = (TP,)
    inputs: Inputs = field(default_factory=tokens)


class Written(nn.Module):
    """A model as users write them: attention by hand, biases by a saved buffer, soft caps, dropout
    of two rates, tied weights, the logits beside the loss."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(WrittenBlock(dropout) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = 30.0 * torch.tanh(self.head(self.norm(x)) / 30.0)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class WrittenBlock(nn.Module):
    """Attention with a bias for each distance, and an MLP."""

    distance: Tensor

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN, eps=1e-5) for _ in range(2))
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)
        steps = torch.arange(SEQ)
        self.register_buffer("distance", -0.1 * (steps[:, None] - steps).abs().float())

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        fused = self.qkv(self.norms[0](x)).view(batch, seq, 3, HEADS, -1)
        q, k, v = (part.transpose(1, 2) for part in fused.unbind(2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(HIDDEN / HEADS)
        scores = 5.0 * torch.tanh(scores / 5.0) + self.distance
        hidden = torch.ones(seq, seq, dtype=torch.bool, device=x.device).triu(1)
        weights = F.dropout(scores.masked_fill(hidden, -math.inf).softmax(-1), self.dropout)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        inner = self.down(F.gelu(self.up(self.norms[1](x))))
        return x + F.dropout(inner, 2 * self.dropout)


class Regression(nn.Module):
    """Takes numbers in the place of ids: a projection, blocks, a class for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(12, HIDDEN)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.SiLU())
            for _ in range(LAYERS)
        )
        self.gain = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(HIDDEN, 7)

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.project(features)
        for block in self.blocks:
            x = x + self.gain * block(x)
        logits = self.head(x.mean(1))
        return F.cross_entropy(logits, labels), logits


def frozen(build: Callable[[], nn.Module], *names: str) -> nn.Module:
    """Return the model with the parameters frozen whose names begin with one of `names`."""
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(names))
    return model


def family(architecture: str, config: str = "", **changes: Any) -> Callable[[], nn.Module]:
    """Return what builds a small model of transformers."""
    return partial(small_model, architecture, config, **changes)


internlm2 = partial(internlm2_tiny, **OURS, num_kv_attention_heads=2)
internlm = partial(internlm_tiny, **OURS)
llama = family("LlamaForCausalLM")
DROPS = {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.1}

CASES: dict[str, Case] = {
    "internlm2": Case(
        internlm2,
        (
            SP,
            PP,
            {"tp": 2, "pp": 2, "checkpoint": True, "num_microbatches": 3},
            {"pp": 2, "num_chunks": 2, "schedule": "interleaved_1f1b", "num_microbatches": 4},
            {"tp": 2, "kernels": "triton"},
            {"tp": 2, "dp": 2, "num_microbatches": 1},
        ),
    ),
    "internlm2, four blocks": Case(
        partial(internlm2_tiny, **{**OURS, "num_layers": 4}, num_kv_attention_heads=2)
    ),
    "internlm2, long": Case(internlm2, (BF16,), tokens(seq=LONG)),
    "internlm2, documents": Case(internlm2, (SP, PP), documents()),
    "internlm2, frozen": Case(
        partial(frozen, internlm2, "tok_embeddings", "layers.0"), (TP, {**PP, "dp": 2})
    ),
    "internlm": Case(internlm, (SP, {"pp": 2, "schedule": "gpipe", "num_microbatches": 3})),
    "internlm, positions": Case(internlm, (TP, BF16), tokens("position_ids")),
    "internlm, documents": Case(internlm, (TP,), documents()),
    "skip connection": Case(zoo.SkipModel, (TP, PP)),
    "written by hand": Case(Written, (TP, {**PP, "tp": 2})),
    "written by hand, bf16": Case(partial(Written, 0.0), (BF16,)),
    "numbers in": Case(
        Regression,
        ({"pp": 2, "num_microbatches": 2}, {"dp": 2}),
        {"features": ((4, SEQ, 12), torch.float32), "labels": ((4,), torch.int64)},
    ),
    "Llama": Case(llama, (SP, {**PP, "tp": 2, "dtype": "bfloat16"})),
    "Llama, long": Case(llama, (BF16,), tokens(seq=LONG)),
    "Llama, masks": Case(llama, (TP, PP), tokens("position_ids", "attention_mask")),
    "GPT-2": Case(family("GPT2LMHeadModel"), (SP, PP), tokens("attention_mask")),
    "GPT-2, dropout": Case(family("GPT2LMHeadModel", **DROPS), (TP, PP)),
    "Mistral": Case(family("MistralForCausalLM", layers=2)),
    "Mixtral": Case(family("MixtralForCausalLM")),
    "Qwen2": Case(family("Qwen2ForCausalLM"), (PP,)),
    "Qwen3": Case(family("Qwen3ForCausalLM"), (SP,)),
    "Qwen3-MoE": Case(family("Qwen3MoeForCausalLM")),
    "Phi-3": Case(family("Phi3ForCausalLM"), (BF16,)),
    "Gemma": Case(family("GemmaForCausalLM")),
    "Gemma 2": Case(family("Gemma2ForCausalLM"), (TP, BF16)),
    "Gemma 3": Case(family("Gemma3ForCausalLM")),
    "GPT-NeoX": Case(family("GPTNeoXForCausalLM"), (TP,), tokens("position_ids")),
    "GPT-J": Case(family("GPTJForCausalLM", **DROPS)),
    "OPT": Case(family("OPTForCausalLM"), (TP,), tokens("attention_mask")),
    "Falcon": Case(family("FalconForCausalLM", new_decoder_architecture=True)),
    "BLOOM": Case(family("BloomForCausalLM")),
    "StableLM": Case(family("StableLmForCausalLM"), (PP,)),
    "Cohere": Case(family("CohereForCausalLM")),
    "OLMo 2": Case(family("Olmo2ForCausalLM")),
    "SmolLM3": Case(family("SmolLM3ForCausalLM", layers=4, no_rope_layers=[1, 1, 1, 0])),
    "Granite": Case(family("GraniteForCausalLM")),
    "GPT-OSS": Case(family("GptOssForCausalLM")),
}


def make_trial(name: str, plan: dict[str, Any]) -> Trial:
    """Return the trial of a case under one of its plans."""
    case = CASES[name]
    values = dict(plan)
    dp = values.pop("dp", 1)
    settled = Plan(num_microbatches=2).replace(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.build().float().train()
    traced = replace(trace(model, example_inputs=case.inputs), plan=settled)
    program = copy_program(traced)
    run_passes(program, standard_passes(settled))
    return Trial(traced, program, schedule_of(settled), model, dp)
