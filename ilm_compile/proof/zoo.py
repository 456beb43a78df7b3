"""Small models and plans on which a pass is tried: the shapes of graph that passes meet.

All models are of two blocks, in float64, and take (rows, 8) tokens out of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilm_compile.models import internlm2_tiny, internlm_tiny
from ilm_compile.program.plan import Plan
from ilm_compile.proof.promote import to_float64

SEQ, VOCAB, HIDDEN, HEADS, LAYERS = 8, 64, 32, 4, 2
IGNORED = -100
SIZES = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_seq_len": SEQ,
}
PLANS = (  # `check_pass` gives every second one two data-parallel ranks
    Plan(num_microbatches=2),
    Plan(num_microbatches=1, tp=2),
    Plan(num_microbatches=4, pp=2),
    Plan(num_microbatches=2, tp=2, pp=2, checkpoint=True),
)


def positions(shape: tuple[int, int]) -> Tensor:
    """Return positions (rows, tokens) that begin elsewhere in each row."""
    rows, length = shape
    return (torch.arange(length) + torch.arange(rows).unsqueeze(1)) % length


def padding_mask(shape: tuple[int, int]) -> Tensor:
    """Return a mask (rows, tokens) that leaves out the end of every second row."""
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1::2, -shape[1] // 4 :] = 0
    return mask


# Inputs beside the ids and labels, and the models that are given them.
FURTHER: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "position_ids": positions,
    "attention_mask": padding_mask,
}
INPUTS: dict[str, tuple[str, ...]] = {
    "internlm": ("position_ids",),
    "hf-llama": ("position_ids", "attention_mask"),
}


class SkipModel(nn.Module):
    """What stages and regions find hard: a skip connection over all blocks, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        nn.init.normal_(self.embed.weight, std=0.1)  # logits of ordinary size
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(HIDDEN),
                nn.Linear(HIDDEN, 2 * HIDDEN),
                nn.GELU(),
                nn.Linear(2 * HIDDEN, HIDDEN),
            )
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = embedded = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head(x + embedded).flatten(0, 1), labels.flatten())


def _hf_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        vocab_size=VOCAB,
    )
    return LlamaForCausalLM(config)


def _hf_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=SEQ,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


_HUGGING_FACE: dict[str, Callable[[], nn.Module]] = {"hf-llama": _hf_llama, "hf-gpt2": _hf_gpt2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "internlm": lambda: internlm_tiny(**SIZES),
    "internlm2": lambda: internlm2_tiny(**SIZES, num_kv_attention_heads=2),
    "skip": SkipModel,
    **(_HUGGING_FACE if find_spec("transformers") else {}),
}


def make_model(build: Callable[[], nn.Module]) -> nn.Module:
    """Return the model in float64, the same each time, no parameter at its initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = to_float64(build()).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model
