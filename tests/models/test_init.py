"""Initial weights are a function of the seed and the name, whoever asks and for which rows."""

import math
from functools import partial

import pytest
import torch

from ilm_compile.errors import IlmCompileError
from ilm_compile.models import initialize_, internlm2_tiny, internlm_tiny
from tests.support.equality import decoder

makers = pytest.mark.parametrize(
    "make",
    [internlm_tiny, internlm2_tiny, partial(decoder, "INTERNLM_MoE", num_shared_experts=1)],
    ids=["internlm", "internlm2", "experts"],
)


@makers
def test_built_for_real_equals_materialised_from_meta(make):
    real = make(seed=7)
    with torch.device("meta"):
        meta = make(seed=7)
    for name, parameter in real.named_parameters():
        assert torch.equal(parameter, meta.initial_parameter(name)), name


def test_global_random_state_and_depth_change_nothing():
    torch.manual_seed(1)
    shallow = internlm2_tiny(num_layers=2)
    torch.manual_seed(2)
    deep = internlm2_tiny(num_layers=4)
    names = dict(deep.named_parameters())
    for name, parameter in shallow.named_parameters():
        assert torch.equal(parameter, names[name]), name


def test_bits_are_pinned():
    """Another version of this package must start the same training."""
    values = internlm2_tiny().initial_parameter("layers.1.attention.wo.weight")[0, :3]
    expected = torch.tensor([-0.01314309, -0.02009724, -0.02380829])
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)


def test_seeds_and_names_give_different_values():
    model = internlm2_tiny()
    w1, other_layer = (f"layers.{i}.feed_forward.w1.weight" for i in (0, 1))
    first = model.initial_parameter(w1)
    assert not torch.equal(first, model.initial_parameter(w1, seed=1))
    assert not torch.equal(first, model.initial_parameter(other_layer))
    assert not torch.equal(first, model.initial_parameter("layers.0.feed_forward.w3.weight"))


@pytest.mark.parametrize("rows", [(0, 5), (1000, 3000), (2047, 2049), (4090, 4100), (7, 7)])
def test_rows_equal_the_same_rows_of_the_whole(rows):
    # 512 columns: a chunk is 2048 rows, and the last one is short.
    with torch.device("meta"):
        model = internlm2_tiny(hidden_size=512, vocab_size=4100, num_layers=1)
    whole = model.initial_parameter("tok_embeddings.weight")
    part = model.initial_parameter("tok_embeddings.weight", rows=rows)
    assert torch.equal(part, whole[slice(*rows)])


def test_only_the_chunks_that_overlap_are_drawn(monkeypatch):
    with torch.device("meta"):
        model = internlm2_tiny(hidden_size=512, vocab_size=2**20, num_layers=1)
    drawn = []
    normal_ = torch.Tensor.normal_
    monkeypatch.setattr(
        torch.Tensor, "normal_", lambda x, **kw: normal_(drawn.append(x.shape) or x, **kw)
    )
    model.initial_parameter("tok_embeddings.weight", rows=(5000, 5100))
    assert drawn == [(2048, 512)]


def test_two_chunks_differ():
    with torch.device("meta"):
        model = internlm2_tiny(hidden_size=512, vocab_size=4096, num_layers=1)
    first, second = model.initial_parameter("output.weight").chunk(2)
    assert not torch.equal(first, second)


STD = {
    ("internlm", "embedding.weight"): 0.0052,
    ("internlm", "blocks.3.mixer.Wqkv.weight"): 0.006,
    ("internlm", "blocks.3.mixer.out_proj.weight"): 0.006 / math.sqrt(8),
    ("internlm", "blocks.3.mlp.w1.weight"): 0.006,
    ("internlm", "blocks.3.mlp.w3.weight"): 0.006,
    ("internlm", "blocks.3.mlp.w2.weight"): 0.006 / math.sqrt(8),
    ("internlm", "head.weight"): 0.0052,
    ("internlm2", "tok_embeddings.weight"): 0.02,
    ("internlm2", "layers.0.attention.wo.weight"): 0.02 / math.sqrt(2),
    ("internlm2", "layers.3.attention.wqkv.weight"): 0.02,
    ("internlm2", "layers.3.feed_forward.w2.weight"): 0.02 / math.sqrt(8),
    ("internlm2", "output.weight"): 0.02,
}


@pytest.mark.parametrize(
    ("family", "name", "std"), [(*key, std) for key, std in STD.items()], ids=lambda v: str(v)
)
@pytest.mark.parametrize("init_type", ["normal", "uniform"])
def test_standard_deviation(family, name, std, init_type):
    make = {"internlm": internlm_tiny, "internlm2": internlm2_tiny}[family]
    with torch.device("meta"):
        model = make(init_type=init_type, hidden_size=256)
    values = model.initial_parameter(name)
    assert values.std().item() == pytest.approx(std, rel=0.02)
    assert abs(values.mean().item()) < 0.02 * std
    if init_type == "uniform":
        assert values.abs().max().item() == pytest.approx(math.sqrt(3) * std, rel=0.001)


def test_norms_start_at_one_and_biases_at_zero():
    model = internlm_tiny()
    assert torch.equal(model.blocks[1].norm2.weight, torch.ones(64))
    assert torch.equal(model.blocks[1].mixer.Wqkv.bias, torch.zeros(192))


def test_initialize_refills_in_place_in_the_model_dtype():
    model = internlm2_tiny().to(torch.bfloat16)
    storage = model.output.weight.data_ptr()
    initialize_(model, seed=9)
    expected = internlm2_tiny(seed=9).output.weight.to(torch.bfloat16)
    assert torch.equal(model.output.weight, expected)
    assert model.output.weight.data_ptr() == storage


def test_refuses_an_unknown_name():
    with pytest.raises(IlmCompileError, match=r"InternLM has no parameter 'wte'; it has embedding"):
        internlm_tiny().initial_parameter("wte")


def test_refuses_rows_outside_the_parameter():
    with pytest.raises(IlmCompileError, match=r"norm.weight: expected rows within \(0, 64\), got"):
        internlm_tiny().initial_parameter("norm.weight", rows=(60, 65))
