"""The models that the IR is tested on, in float64, with a batch for each."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from ilm_compile import models
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from tests.support.models import hf_llama_like, random_tokens, randomize_
from tests.support.promote import to_float64
from tests.support.tiny_model import SEQ, VOCAB, TinyTransformer

FIELDS = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "max_seq_len": SEQ}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": SEQ}
    quiet = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **quiet, eos_token_id=0, bos_token_id=0))


def llama() -> nn.Module:
    return hf_llama_like(models.internlm2_tiny(**FIELDS))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "internlm": lambda: models.internlm_tiny(**FIELDS),
    "internlm2": lambda: models.internlm2_tiny(**FIELDS),
    "llama": llama,
    "gpt2": gpt2,
    "tied": lambda: TinyTransformer(num_blocks=2, skip=True, tied=True, early=True),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, with weights of ordinary size, and a batch of two rows."""
    torch.manual_seed(0)
    model = randomize_(to_float64(MODELS[name]()))
    input_ids, labels = random_tokens(2, SEQ, VOCAB)
    return model, {"input_ids": input_ids, "labels": labels}


@cache
def traced(name: str) -> Program:
    """The model's program, for reading: tests share it."""
    model, batch = build(name)
    return trace(model, example_inputs=batch)
