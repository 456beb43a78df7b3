"""Right programs that a proof by a model rebuilt from a configuration called wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ilm_compile
from ilm_compile.models import internlm2_tiny
from ilm_compile.program.placement import I
from ilm_compile.proof import zoo
from tests.proof.small import INPUTS
from tests.support.zoo import small_model

WIDE = {name: ((2, 16), torch.int64) for name in ("input_ids", "labels")}


def internlm2(layers: int = 2, **changes: Any) -> nn.Module:
    sizes = {**zoo.SIZES, "num_layers": layers, "num_kv_attention_heads": 2, **changes}
    return zoo.make_model(lambda: internlm2_tiny(**sizes))


def freeze(model: nn.Module, *prefixes: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)
    return model


class Adapted(nn.Module):
    """A frozen product and a trained one of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.down = nn.Parameter(torch.randn(4, base.in_features, **like))
        self.up = nn.Parameter(torch.zeros(base.out_features, 4, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up) * 0.5


def adapted() -> nn.Module:
    model = freeze(internlm2(), "")
    for layer in model.layers:
        layer.attention.wo = Adapted(layer.attention.wo)
        layer.feed_forward.w1 = Adapted(layer.feed_forward.w1)
    return model


def tied_by_hand() -> nn.Module:
    model = internlm2()
    model.output.weight = model.tok_embeddings.weight
    return model


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


def other_activation() -> nn.Module:
    model = zoo.make_model(zoo.MODELS["hf-llama"])
    model.model.layers[1].mlp.act_fn = Squared()
    return model


class NoConfig(nn.Module):
    """A model without a configuration, which leaves its last loss behind, as llama2.c does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(zoo.VOCAB, zoo.HIDDEN)
        self.places = nn.Embedding(4 * zoo.SEQ, zoo.HIDDEN)  # longer than the sequence
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(zoo.HIDDEN),
                nn.Linear(zoo.HIDDEN, 64),
                nn.GELU(),
                nn.Linear(64, zoo.HIDDEN),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(zoo.HIDDEN, zoo.VOCAB)
        self.last_loss: Tensor | None = None

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids) + self.places(places)
        for block in self.blocks:
            x = x + block(x)
        self.last_loss = F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        return self.last_loss


class Pictures(nn.Module):
    """A vision transformer: patches, no vocabulary, few classes."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1, 32))
        self.places = nn.Parameter(torch.randn(1, 5, 32))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x[:, 0]), labels)


class PicturesAndWords(nn.Module):
    """Features of a picture stand before the words, LLaVA's way."""

    def __init__(self) -> None:
        super().__init__()
        self.words = zoo.make_model(zoo.MODELS["hf-llama"])
        self.project = nn.Linear(6, zoo.HIDDEN)

    def forward(self, features: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.words.get_input_embeddings()(input_ids)
        x = torch.cat([self.project(features), x], 1)
        ignored = labels.new_full(features.shape[:2], -100)
        labels = torch.cat([ignored, labels], 1)
        return self.words(inputs_embeds=x, labels=labels, use_cache=False).loss


def hugging_face(architecture: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: small_model(architecture, **changes)


CHUNKS = {"tp": 2, "pp": 2, "num_chunks": 2, "num_microbatches": 4}
PIXELS = {"pixels": ((4, 3, 8, 8), torch.float64), "labels": ((4,), torch.int64)}
FEATURES = {"features": ((2, 3, 6), torch.float64), **INPUTS}
CLASSES = {"input_ids": ((2, 16), torch.int64), "labels": ((2,), torch.int64)}
DEEPSEEK = {"mlp_layer_types": ["dense", "sparse"]}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "frozen embedding": (lambda: freeze(internlm2(), "tok_embeddings"), INPUTS, {"tp": 2}),
    "frozen block, pp": (lambda: freeze(internlm2(), "layers.0"), INPUTS, {"pp": 2}),
    "frozen block, dp": (lambda: freeze(internlm2(), "layers.1"), INPUTS, {"dp": 2}),
    "frozen blocks, chunks": (
        lambda: freeze(internlm2(4), "layers.0", "layers.2"),
        INPUTS,
        CHUNKS,
    ),
    "frozen block, zero": (lambda: freeze(internlm2(), "layers.0"), INPUTS, {"dp": 4, "zero": 3}),
    "adapters": (adapted, INPUTS, {"tp": 2, "pp": 2}),
    "tied by hand": (tied_by_hand, INPUTS, {"tp": 2, "pp": 2}),
    "other activation": (other_activation, INPUTS, {"tp": 2, "dp": 2}),
    "one layer's placement": (
        other_activation,
        INPUTS,
        {"tp": 2, "constraints": {"model.layers.1.mlp.down_proj.weight": I}},
    ),
    "SmolLM3": (hugging_face("SmolLM3ForCausalLM", layers=8), WIDE, {"tp": 2, "pp": 2}),
    "Qwen3-MoE, sparse": (
        hugging_face("Qwen3MoeForCausalLM", layers=4, decoder_sparse_step=2),
        WIDE,
        {"tp": 2},
    ),
    "DeepSeek-V3": (hugging_face("DeepseekV3ForCausalLM"), WIDE, {"tp": 2}),
    "classification": (
        hugging_face("LlamaForSequenceClassification", num_labels=3),
        CLASSES,
        {"tp": 2},
    ),
    "no config": (lambda: zoo.make_model(NoConfig), INPUTS, {"tp": 2, "pp": 2}),
    "ViT": (lambda: zoo.make_model(Pictures), PIXELS, {"tp": 2, "pp": 2}),
    "LLaVA": (lambda: zoo.make_model(PicturesAndWords), FEATURES, {"tp": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_right_program_is_proved_as_it_is(name: str) -> None:
    build, inputs, plan = CASES[name]
    report = ilm_compile.verify(build(), example_inputs=inputs, **plan)
    assert report.ok, str(report)
    assert report.max_grad_error < 1e-12
    assert report.checks[1].detail.startswith("the model itself")


def test_the_model_that_was_proved_is_as_it_was() -> None:
    model = zoo.make_model(NoConfig).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert ilm_compile.verify(model, example_inputs=INPUTS, pp=2).ok
    assert not model.training
    assert model.last_loss is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
