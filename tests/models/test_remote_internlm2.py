"""InternLM2 as it is published beside its weights: traced unchanged, and trained as in PyTorch."""

from __future__ import annotations

import pytest
import torch

from ilm_compile import partition
from ilm_compile.program.trace import trace
from tests.program.training import SEQ, assert_trains_equal, tokens
from tests.support.internlm2_remote import ComputedRotary, RemoteConfig, RemoteForCausalLM
from tests.support.promote import promoted_float32

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def build(**fields):
    torch.manual_seed(0)
    model = RemoteForCausalLM(RemoteConfig(**fields)).double()
    for module in model.modules():
        if isinstance(module, ComputedRotary):  # float32 by its own casts, in both
            module.inv_freq = module.inv_freq.float()
    return model


def inputs(kind):
    ones = torch.ones(4, SEQ, dtype=torch.int64)
    ones[1, :2] = 0
    steps = torch.arange(SEQ).repeat(4, 1)
    given = {"ids": {}, "mask": {"attention_mask": ones}, "positions": {"position_ids": steps}}
    return {**tokens(), **given[kind]}


@pytest.mark.parametrize("given", ["ids", "mask", "positions"])
@pytest.mark.parametrize("rotary", ["cached", "computed", "dynamic"])
def test_trains_as_in_pytorch(rotary, given):
    model = build(rotary=rotary, bias=True)
    with promoted_float32():
        assert_trains_equal(model, inputs(given))


@pytest.mark.parametrize("rotary", ["cached", "dynamic"])
def test_a_sequence_longer_than_the_cache_trains_as_in_pytorch(rotary):
    with promoted_float32():
        model = build(rotary=rotary, max_position_embeddings=4)
        assert_trains_equal(model, tokens())


def test_gradient_checkpointing_trains_as_in_pytorch():
    with promoted_float32():
        model = build()
        model.model.gradient_checkpointing = True

        def off():
            model.model.gradient_checkpointing = False

        assert_trains_equal(model, before_plain=off)


def test_a_cache_that_is_asked_for_is_left_out():
    with promoted_float32():
        assert_trains_equal(build(), arguments={"use_cache": True})


def test_on_the_meta_device_it_is_the_same_program():
    rows = {name: (tuple(value.shape), value.dtype) for name, value in tokens().items()}
    with torch.device("meta"):
        meta = RemoteForCausalLM(RemoteConfig())
    real = RemoteForCausalLM(RemoteConfig())
    assert trace(meta, example_inputs=rows).dump() == trace(real, example_inputs=rows).dump()


def test_packed_weights_are_divided_by_groups():
    rows = {name: value[:2] for name, value in tokens().items()}
    program = partition(build(), example_inputs=rows, tp=2, pp=2, num_microbatches=2)
    placements = {name: str(v.layout.on("tp")) for name, v in program.variables.items()}
    assert placements["model.layers.0.attention.wqkv.weight"] == "S(0)"
    assert placements["model.layers.1.attention.wo.weight"] == "S(1)"
    assert placements["model.layers.0.feed_forward.w2.weight"] == "S(1)"
