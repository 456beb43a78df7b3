"""Recurrent layers and torch's own transformers, as they stand in PyTorch's tutorials."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ilm_compile.errors import TraceError
from ilm_compile.program.dropout import seeded_dropout
from ilm_compile.program.trace import trace
from tests.program.training import LM, SEQ, WIDTH, assert_trains_equal, tokens

DOUBLE = {"dtype": torch.float64}


class Recurrent(LM):
    """A recurrent layer between embedding and head."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, **DOUBLE, **options)
        width = self.rnn(torch.zeros(1, 1, WIDTH, **DOUBLE))[0].shape[-1]
        self.layer = nn.Linear(width, WIDTH, **DOUBLE)

    def mix(self, h):
        out, state = self.rnn(h)
        last = state[0] if isinstance(state, tuple) else state
        return self.layer(out) + last.sum()


LAYERS = {
    "LSTM": (nn.LSTM, {"batch_first": True}),
    "LSTM, tokens first": (nn.LSTM, {}),
    "LSTM, two layers in both directions": (
        nn.LSTM,
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
    ),
    "LSTM without bias, projected": (nn.LSTM, {"bias": False, "proj_size": 4, "batch_first": True}),
    "LSTM, projected": (nn.LSTM, {"proj_size": 4, "batch_first": True}),
    "GRU": (nn.GRU, {"batch_first": True}),
    "GRU, two layers in both directions": (
        nn.GRU,
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
    ),
    "RNN": (nn.RNN, {"batch_first": True}),
    "RNN of relu": (nn.RNN, {"nonlinearity": "relu", "batch_first": True, "bias": False}),
}


@pytest.mark.parametrize(("kind", "options"), LAYERS.values(), ids=LAYERS)
def test_trains_as_in_pytorch(kind, options):
    assert_trains_equal(Recurrent(kind, **options), num_microbatches=1)


def test_dropout_between_layers_is_drawn_alike():
    model = Recurrent(nn.LSTM, num_layers=3, dropout=0.5, batch_first=True)
    program = trace(model, example_inputs=tokens())
    assert len(program.graph.find_nodes(op="call_function", target=seeded_dropout)) == 2


def test_a_long_recurrence_is_refused():
    long = {name: value.repeat(1, 200) for name, value in tokens().items()}
    with pytest.raises(TraceError, match=r"lstm over 1200 tokens \(at .*py:\d+"):
        trace(Recurrent(nn.LSTM, batch_first=True), example_inputs=long)


class Encoder(LM):
    """nn.TransformerEncoder with a mask of its own, without is_causal."""

    def __init__(self, mask):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True, **DOUBLE)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.register_buffer("mask", causal() if mask == "buffer" else None)
        self.own = mask

    def mix(self, h):
        return self.encoder(h, self.mask if self.own == "buffer" else causal())


def causal():
    return nn.Transformer.generate_square_subsequent_mask(SEQ).double()


@pytest.mark.parametrize("mask", ["buffer", "made in the forward"])
def test_an_encoder_with_a_mask(mask):
    parallel = assert_trains_equal(Encoder(mask))
    assert parallel.plan.num_microbatches == 2


def test_a_branch_that_a_buffer_decides_is_warned_of():
    (warning,) = trace(Encoder("buffer"), example_inputs=tokens()).warnings
    assert warning.startswith("the value of mask now decides what is traced (at ")
    assert not trace(Encoder("made in the forward"), example_inputs=tokens()).warnings


class Pair(LM):
    """nn.Transformer: encoder and decoder over the same tokens."""

    def __init__(self):
        super().__init__()
        self.pair = nn.Transformer(WIDTH, 2, 1, 1, 16, 0.0, batch_first=True, **DOUBLE)

    def mix(self, h):
        return self.pair(h, h, tgt_mask=causal())


def test_an_encoder_and_a_decoder():
    assert_trains_equal(Pair())


class Attention(LM):
    """nn.MultiheadAttention, its weights asked for."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **DOUBLE)

    def mix(self, h):
        out, weights = self.attention(h, h, h, attn_mask=causal())
        return out + weights.sum(-1, keepdim=True)


def test_multihead_attention():
    assert_trains_equal(Attention())
