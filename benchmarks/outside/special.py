"""Models of transformers changed after construction, and those that are no causal decoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.outside.entry import (
    CHUNKS,
    PP_DP,
    SEQ,
    TP_DP,
    TP_PP,
    VOCAB,
    Batch,
    MakeBatch,
    Outside,
    classified_images,
    draw,
    tokens,
    uneven_,
)
from tests.support.zoo import float64, small_model, small_values

CLASSES = 3
SIDE, PATCH = 16, 8
PATCHES = (SIDE // PATCH) ** 2
IMAGE_TOKEN = VOCAB - 1

Change = Callable[[nn.Module], object]


def changed(layers: int, change: Change, architecture: str = "LlamaForCausalLM") -> nn.Module:
    model = small_model(architecture, layers=layers)
    change(model)
    return model


def freeze(*prefixes: str) -> Change:
    """Return a change that freezes the parameters whose names start so."""

    def change(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name.startswith(prefixes):
                parameter.requires_grad_(False)

    return change


def freeze_norms(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(False)


def tie(model: nn.Module) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def replace_activation(model: nn.Module) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def checkpoint_inside(model: nn.Module, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def llama(layout: str, layers: int, change: Change) -> Outside:
    return Outside("transformers, changed", partial(changed, layers, change), layout)


def gpt2(layout: str, change: Change) -> Outside:
    return Outside("transformers, changed", partial(changed, 2, change, "GPT2LMHeadModel"), layout)


def plain(architecture: str, **changes: Any) -> nn.Module:
    """Return a small model of transformers whose configuration stays an encoder's."""
    import transformers

    model_class = getattr(transformers, architecture)
    values = small_values(model_class.config_class, **changes)
    return float64(lambda: model_class(model_class.config_class(**values)))


def padded(rows: int, generator: torch.Generator) -> Batch:
    """Token ids with padding at the end of each row but the first, and a label for each."""
    lengths = torch.tensor([SEQ - row % 5 for row in range(rows)])
    mask = (torch.arange(SEQ)[None] < lengths[:, None]).long()
    ids = draw((rows, SEQ), VOCAB - 4, generator) + 4
    labels = uneven_(draw((rows, SEQ), VOCAB, generator)).masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def classified(rows: int, generator: torch.Generator) -> Batch:
    batch = padded(rows, generator)
    return {**batch, "labels": uneven_(draw((rows,), CLASSES, generator))}


def tagged(rows: int, generator: torch.Generator) -> Batch:
    batch = padded(rows, generator)
    return {
        **batch,
        "labels": batch["labels"].where(batch["labels"] < 0, batch["labels"] % CLASSES),
    }


pixels = partial(classified_images, name="pixel_values", side=SIDE, classes=CLASSES)


def pixels_and_tokens(rows: int, generator: torch.Generator) -> Batch:
    """One image per row, its tokens after the first one."""
    text = tokens(vocab=IMAGE_TOKEN)(rows, generator)
    text["input_ids"][:, 1 : 1 + PATCHES] = IMAGE_TOKEN
    text["labels"][:, : 1 + PATCHES] = -100
    return {"pixel_values": pixels(rows, generator)["pixel_values"], **text}


def llava() -> nn.Module:
    import transformers as tf

    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=SIDE, patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    text = tf.LlamaConfig(**small_values(tf.LlamaConfig))
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN,
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    return float64(lambda: tf.LlavaForConditionalGeneration(config))


def other(layout: str, batch: MakeBatch, architecture: str, **changes: Any) -> Outside:
    return Outside("transformers", partial(plain, architecture, **changes), layout, batch)


_LABELS = {"num_labels": CLASSES}
_IMAGE = {"image_size": SIDE, "patch_size": PATCH, **_LABELS}
_PAIR = tokens(vocab=VOCAB)
_T5 = {"d_kv": 8, "d_ff": 128, "dropout_rate": 0.0, "decoder_start_token_id": 0}
_BLOCK0 = ("model.embed", "model.layers.0.")

SPECIAL = {
    "Llama, frozen embedding": llama(TP_PP, 2, freeze("model.embed")),
    "Llama, frozen first stage": llama(PP_DP, 2, freeze(*_BLOCK0)),
    "Llama, frozen blocks": llama("dp=4", 2, freeze(*_BLOCK0)),
    "Llama, frozen blocks, chunks": llama(CHUNKS, 4, freeze(*_BLOCK0, "model.layers.1.")),
    "Llama, frozen blocks, zero=3": llama("dp=4, zero=3", 4, freeze(*_BLOCK0, "model.layers.2.")),
    "Llama, frozen norms": llama(TP_DP, 2, freeze_norms),
    "Llama, tied by hand": llama(TP_PP, 2, tie),
    "Llama, one other activation": llama(TP_PP, 4, replace_activation),
    "GPT-2, checkpointed inside": gpt2(TP_DP, partial(checkpoint_inside, reentrant=False)),
    "GPT-2, checkpointed, reentrant": gpt2(TP_DP, partial(checkpoint_inside, reentrant=True)),
    "Llama, sequence classification": other(
        TP_PP, classified, "LlamaForSequenceClassification", **_LABELS
    ),
    "BERT, masked tokens": other(TP_PP, padded, "BertForMaskedLM"),
    "BERT, sequence classification": other(
        TP_DP, classified, "BertForSequenceClassification", **_LABELS
    ),
    "RoBERTa, sequence classification": other(
        TP_PP, classified, "RobertaForSequenceClassification", **_LABELS
    ),
    "DistilBERT, token classification": other(
        "tp=4", tagged, "DistilBertForTokenClassification", dim=64, hidden_dim=128, **_LABELS
    ),
    "ELECTRA, masked tokens": other(TP_DP, padded, "ElectraForMaskedLM"),
    "ALBERT, one block reused": other(TP_DP, padded, "AlbertForMaskedLM"),
    "DeBERTa-v2, token classification": other(
        PP_DP, tagged, "DebertaV2ForTokenClassification", **_LABELS
    ),
    "ModernBERT, masked tokens": other(TP_PP, padded, "ModernBertForMaskedLM"),
    "T5": other(TP_PP, _PAIR, "T5ForConditionalGeneration", **_T5),
    "mT5, gated": other(TP_DP, _PAIR, "MT5ForConditionalGeneration", **_T5),
    "BART": other(TP_PP, _PAIR, "BartForConditionalGeneration"),
    "Pegasus": other(TP_DP, _PAIR, "PegasusForConditionalGeneration"),
    "Marian": other(PP_DP, _PAIR, "MarianMTModel"),
    "ViT": other(TP_PP, pixels, "ViTForImageClassification", **_IMAGE),
    "DeiT": other(TP_DP, pixels, "DeiTForImageClassification", **_IMAGE),
    "DINOv2": other("tp=4", pixels, "Dinov2ForImageClassification", **_IMAGE),
    "LLaVA": Outside("transformers", llava, TP_DP, pixels_and_tokens),
}
