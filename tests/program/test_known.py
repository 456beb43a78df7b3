"""Branches that sizes decide are taken; those that values decide are refused with a way out."""

from __future__ import annotations

import pytest
import torch

from ilm_compile.errors import TraceError
from ilm_compile.program.trace import trace
from tests.program.training import LM, SEQ, VOCAB, assert_trains_equal, tokens


def longest(h):
    return torch.arange(h.shape[1], device=h.device).max() + 1


def in_place(h):
    mask = torch.zeros(h.shape[1], h.shape[1], device=h.device)
    mask.fill_(1).triu_(1)
    return mask


def through_a_view(h):
    mask = torch.zeros(4)
    mask[1:3].fill_(1)
    return mask


DECIDED = {
    "a comparison": lambda m, h: m.layer(h) if longest(h) > 3 else h,
    "the other side": lambda m, h: h if longest(h) > 300 else m.layer(h),
    "a number": lambda m, h: m.layer(h) * longest(h).item(),
    "a list": lambda m, h: m.layer(h) * sum(torch.arange(3).tolist()),
    "a slice": lambda m, h: m.layer(h)[:, : int(longest(h))],
    "in place": lambda m, h: m.layer(h) if in_place(h).sum() == 15 else h,
    "equal": lambda m, h: m.layer(h) if torch.equal(in_place(h), in_place(h)) else h,
    "shape of a value": lambda m, h: m.layer(h) if torch.ones_like(h).sum() > 1 else h,
    "a chance of 0": lambda m, h: h if torch.rand([]) < 0.0 else m.layer(h),
    "one of several": lambda m, h: m.layer(h) if in_place(h).max(0)[0].sum() == 5 else h,
}


@pytest.mark.parametrize("mix", DECIDED.values(), ids=DECIDED)
def test_a_branch_on_sizes_is_taken(mix):
    assert_trains_equal(LM(mix))


REFUSED = {
    "a value": (lambda m, h: m.layer(h) if h.sum() > 0 else h, "branch on shapes"),
    "written through a view": (
        lambda m, h: m.layer(h) if through_a_view(h).sum() > 1 else h,
        "branch on shapes",
    ),
    "random": (lambda m, h: m.layer(h) if torch.rand(()) > 2 else h, "branch on shapes|random"),
    "a chance": (lambda m, h: h if torch.rand([]) < 0.1 else m.layer(h), "branch on shapes|random"),
    "not written yet": (lambda m, h: h if torch.empty(1) > 2 else m.layer(h), "branch on shapes"),
    "where of one": (
        lambda m, h: h[torch.where(h[..., 0] > 0)].sum() + m.layer(h),
        r"where a condition holds \(at .*torch.where\(condition, a, b\)",
    ),
    "nonzero": (lambda m, h: m.layer(h) + h.nonzero().sum(), r"where a condition holds \(at "),
}


@pytest.mark.parametrize(("mix", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_branch_on_values_is_refused(mix, reason):
    with pytest.raises(TraceError, match=reason):
        trace(LM(mix), example_inputs=tokens())


class Packed(LM):
    """Keeps documents apart unless it holds a cache, as transformers does."""

    def forward(self, input_ids, labels, position_ids, use_cache=True):
        self.scale = 2.0 if use_cache else 1.0
        return super().forward(input_ids, labels) * self.scale


def packed():
    return {**tokens(), "position_ids": torch.arange(SEQ).repeat(4, 1)}


def test_packed_positions_are_warned_of_until_the_user_chooses():
    (warning,) = trace(Packed(), example_inputs=packed()).warnings
    assert warning.startswith("position_ids are given and no attention_mask")
    for use_cache in (True, False):
        program = trace(Packed(), example_inputs={**packed(), "use_cache": use_cache})
        assert not program.warnings
        assert program.arguments == {"use_cache": use_cache}
        assert "use_cache" not in program.inputs


@pytest.mark.parametrize("use_cache", [True, False])
def test_arguments_that_are_no_tensors_reach_the_model(use_cache):
    assert_trains_equal(Packed(), packed(), arguments={"use_cache": use_cache})


@pytest.mark.parametrize("apart", [True, False])
def test_documents_of_a_hugging_face_model_are_apart_or_not(apart):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.promote import promoted_float32

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_attention_heads=2, **sizes)).double()
    batch = {**tokens(), "position_ids": torch.arange(SEQ).remainder(3).repeat(4, 1)}
    with promoted_float32():
        assert_trains_equal(model, batch, arguments={"use_cache": not apart})
