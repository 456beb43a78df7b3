"""Public single-file models, retyped in tests/support/outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.outside.entry import (
    BY_ROW,
    CHUNKS,
    SEQ,
    TP_DP,
    TP_PP,
    WHOLE,
    Batch,
    LossOf,
    MakeBatch,
    Outside,
    class_loss,
    classified_images,
    draw,
    token_loss,
    tokens,
    uneven_,
)
from tests.support.outside import (
    VOCAB,
    annotated,
    bert,
    differential,
    from_scratch,
    gpt_fast,
    hand_lora,
    llama2c,
    looped,
    mamba,
    meta_llama,
    mingpt,
    mixers,
    modded_nanogpt,
    moe,
    nanogpt,
    ngpt,
    palm,
    recurrent,
    retention,
    rwkv,
    torch_layers,
    vit,
)
from tests.support.zoo import float64

SOURCE = "retyped"


def second(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a model that returns (logits, loss)."""
    return model(ids, labels)[1]


def left_behind(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the loss that a model keeps as an attribute."""
    model(ids, labels)
    return model.last_loss


def whole(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a model that returns nothing else."""
    return model(ids, labels)


def with_loss(make: Callable[[], nn.Module], pick: Any = second) -> nn.Module:
    return float64(lambda: LossOf(make(), pick))


def losing(
    make: Callable[[], nn.Module], layout: str, pick: Any = second, ignored: int = -1
) -> Outside:
    """Return an entry of a model that computes its own loss."""
    batch = tokens("ids", vocab=VOCAB, ignored=ignored)
    return Outside(SOURCE, partial(with_loss, make, pick), layout, batch)


def scoring(make: Callable[[], nn.Module], layout: str, ids: str = "x") -> Outside:
    """Return an entry of a model that returns logits."""
    return Outside(SOURCE, partial(float64, make), layout, tokens(ids, vocab=VOCAB), token_loss)


def likelihood(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(log_probabilities.flatten(0, 1), labels.flatten(), ignore_index=-100)


def sentences(rows: int, generator: torch.Generator) -> Batch:
    """Two sentences per row, padded with 0, and which of their tokens were masked."""
    ids = draw((rows, SEQ), VOCAB, generator)
    for row in range(rows):
        ids[row, SEQ - row % 4 :] = 0
    segments = (torch.arange(SEQ) < SEQ // 2).long().expand(rows, -1) + 1
    labels = uneven_(draw((rows, SEQ), VOCAB, generator))
    return {"x": ids, "segment_label": segments * (ids > 0), "labels": labels}


def masked_loss(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    return likelihood(outputs[1], labels)


def _gpt_fast() -> nn.Module:
    model = gpt_fast.Transformer()
    model.setup_caches()
    return model


def _lora() -> nn.Module:
    return hand_lora.add_lora(nanogpt.GPT(), "c_attn", "c_proj", "c_fc")


def _entry(batch: MakeBatch, make: Callable[[], nn.Module], layout: str, loss: Any) -> Outside:
    return Outside(SOURCE, partial(float64, make), layout, batch, loss)


PAIRS = tokens("src", "tgt", vocab=VOCAB)

SINGLE_FILES = {
    "nanoGPT": losing(partial(nanogpt.GPT, layers=4), CHUNKS),
    "nanoGPT, no flash, no bias": losing(partial(nanogpt.GPT, bias=False, flash=False), "tp=4"),
    "minGPT": losing(mingpt.GPT, TP_PP),
    "LLMs from scratch": scoring(from_scratch.GPTModel, TP_DP, "in_idx"),
    "llama2.c": losing(llama2c.Transformer, TP_PP, left_behind),
    "Meta Llama, complex rotary": scoring(meta_llama.Transformer, TP_DP, "tokens"),
    "gpt-fast": scoring(_gpt_fast, TP_PP, "idx"),
    "modded-nanogpt": losing(modded_nanogpt.GPT, TP_PP, whole, -100),
    "PaLM-pytorch": scoring(palm.PaLM, TP_DP, "input"),
    "RWKV-v1": losing(partial(rwkv.RWKV, 1), TP_PP, ignored=-100),
    "RWKV-v4, loop": losing(partial(rwkv.RWKV, 4), TP_DP, ignored=-100),
    "mamba-minimal": scoring(mamba.Mamba, TP_PP, "input_ids"),
    "word_language_model, LSTM": scoring(recurrent.LSTMModel, TP_DP, "input"),
    "makemore, GRU": losing(recurrent.MakemoreRNN, "dp=4, zero=3"),
    "makemore, MLP": losing(recurrent.MakemoreMLP, "tp=4"),
    "minGRU": scoring(recurrent.MinGRULM, TP_PP),
    "RetNet": scoring(partial(retention.SoftmaxFreeLM, retention.Retention), TP_DP),
    "linear attention": scoring(partial(retention.SoftmaxFreeLM, retention.LinearAttention), TP_PP),
    "gMLP": scoring(partial(mixers.MixerLM, mixers.SpatialGate), TP_DP),
    "gated convolutions": scoring(partial(mixers.MixerLM, mixers.GatedConvolution), TP_PP),
    "Hyena's FFT filter": scoring(partial(mixers.MixerLM, mixers.LongFilter), TP_DP),
    "Annotated Transformer": _entry(PAIRS, annotated.EncoderDecoder, WHOLE, likelihood),
    "nn.TransformerEncoder": scoring(torch_layers.EncoderLM, TP_PP, "src"),
    "nn.Transformer": _entry(PAIRS, torch_layers.Seq2Seq, TP_DP, token_loss),
    "Differential Transformer": scoring(differential.DiffLM, TP_PP),
    "universal transformer": scoring(looped.UniversalTransformer, TP_DP),
    "nGPT": scoring(ngpt.NGPT, TP_PP),
    "all experts": scoring(partial(moe.MoELM, moe.DenseExperts), TP_PP),
    "masked experts": scoring(partial(moe.MoELM, moe.MaskedExperts), "tp=4"),
    "experts by row": dataclasses.replace(
        scoring(partial(moe.MoELM, moe.RowExperts), TP_DP), refusal=BY_ROW
    ),
    "BERT-pytorch": _entry(sentences, bert.BERTLM, WHOLE, masked_loss),
    "vit-pytorch": _entry(classified_images, vit.ViT, TP_PP, class_loss),
    "vit-pytorch, mean": _entry(classified_images, partial(vit.ViT, "mean"), TP_DP, class_loss),
    "nanoGPT, LoRA by hand": losing(_lora, TP_PP),
}
