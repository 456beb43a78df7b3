"""Emulated training equals a loop of plain PyTorch: several steps, frozen weights, mixed dtypes."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ilm_compile
from ilm_compile.partitioning import make_schedule
from ilm_compile.passes import lower
from ilm_compile.proof import zoo
from ilm_compile.proof.emulate import emulate
from ilm_compile.proof.emulated_rank import EPSILON, LEARNING_RATE
from tests.proof.small import INPUTS, compile_model, make_batch, make_model

BOUND = 1e-9  # of weights: AdamW magnifies rounding
PLANS = {
    "one": {"num_microbatches": 2},
    "tp": {"tp": 2, "num_microbatches": 2},
    "pp": {"pp": 2, "num_microbatches": 3},
    "chunks": {"pp": 2, "num_chunks": 2, "num_microbatches": 2},
    "dp": {"tp": 2, "pp": 2, "num_microbatches": 2},
}


class Model(nn.Module):
    """Four blocks, each of a linear layer and a norm whose output a scalar scales."""

    def __init__(self, *, tied=False):
        super().__init__()
        self.embed = nn.Embedding(zoo.VOCAB, zoo.HIDDEN)
        self.blocks = nn.ModuleList(nn.Linear(zoo.HIDDEN, zoo.HIDDEN) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(zoo.HIDDEN) for _ in range(4))
        self.head = nn.Linear(zoo.HIDDEN, zoo.VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + norm(torch.tanh(block(x.to(block.weight.dtype))).to(norm.weight.dtype))
        logits = self.head(x.to(self.head.weight.dtype))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def made(*, frozen="", **options):
    model = zoo.make_model(lambda: Model(**options))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(tuple(frozen.split()))))
    return model


def trained(model, batches, max_norm):
    """Losses and weights of a plain training loop, and the first step's gradients and logits."""
    model = copy.deepcopy(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPSILON)
    losses, gradients, logits = [], {}, []
    for batch in batches:
        optimizer.zero_grad()
        result = model(**batch)
        result["loss"].backward()
        losses.append(result["loss"].detach())
        logits.append(result["logits"].detach())
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        gradients = gradients or found
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return losses, gradients, dict(model.named_parameters()), logits


def batches_of(program, dp, count=3):
    batch = make_batch(program, dp)
    return [{n: v.roll(k, 0).roll(k, 1) for n, v in batch.items()} for k in range(count)]


def run(model, plan, *, max_norm=1.0, compiler=compile_model):
    dp = 2 if plan == "dp" else 1
    program = compiler(model, **PLANS[plan])
    batches = batches_of(program, dp)
    steps = emulate(
        lower(program),
        make_schedule(program.plan),
        model,
        batches,
        dp=dp,
        max_norm=max_norm,
        keep_outputs=True,
    )
    return steps, trained(model, batches, max_norm)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("max_norm", [0.05, None])
def test_three_steps_equal_a_plain_training_loop(plan, max_norm):
    model = made(tied=True)
    steps, (losses, gradients, weights, logits) = run(model, plan, max_norm=max_norm)
    for step, loss, output in zip(steps, losses, logits, strict=True):
        torch.testing.assert_close(step.loss, loss, rtol=BOUND, atol=0)
        torch.testing.assert_close(step.outputs["logits"], output, rtol=BOUND, atol=BOUND)
    same(steps[0].gradients, gradients, 1e-10)
    same(steps[-1].weights, weights, BOUND)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "frozen", ["embed", "embed blocks.0 blocks.1 norms.0 norms.1", "blocks norms.2", "head"]
)
def test_frozen_weights_get_no_gradient_and_stay(plan, frozen):
    model = made(frozen=frozen)
    steps, (_, gradients, weights, _) = run(model, plan)
    same(steps[0].gradients, gradients, 1e-10)
    same(steps[-1].weights, weights, BOUND)
    for name, value in model.named_parameters():
        if not value.requires_grad:
            assert torch.equal(steps[-1].weights[name], value)


def test_a_frozen_weight_may_be_held_by_two_stages():
    steps, (_, gradients, weights, _) = run(made(tied=True, frozen="embed"), "pp")
    same(steps[0].gradients, gradients, 1e-10)
    same(steps[-1].weights, weights, BOUND)


@pytest.mark.parametrize("plan", ["one", "tp", "dp"])
def test_parameters_may_have_several_dtypes(plan):
    model = made()
    model.norms.float()
    model.blocks[1].float()
    as_it_is = partial(ilm_compile.partition, example_inputs=INPUTS)
    steps, (losses, gradients, weights, _) = run(model, plan, compiler=as_it_is)
    torch.testing.assert_close(steps[0].loss, losses[0], rtol=1e-5, atol=0)
    same(steps[0].gradients, gradients, 1e-4)
    assert {n: w.dtype for n, w in steps[0].weights.items()} == {
        n: w.dtype for n, w in weights.items()
    }


def test_the_model_may_be_given_as_tensors():
    model = make_model("hf-gpt2")
    program = compile_model(model, tp=2, pp=2)
    batch = make_batch(program)
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = {n: t.clone() for n, t in tensors.items()}
    schedule = make_schedule(program.plan)
    first, second = (
        emulate(lower(program), schedule, given, [batch], max_norm=None)[0]
        for given in (model, tensors)
    )
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(first.weights[n], w) for n, w in second.weights.items())
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())
    assert second.outputs == {}


def same(found, expected, bound):
    assert found.keys() == expected.keys()
    floor = 1e-5 * torch.stack([e.detach().double().norm() for e in expected.values()]).norm()
    for name, value in expected.items():
        error = (found[name] - value.detach()).double().norm()
        assert error <= bound * torch.maximum(value.detach().double().norm(), floor), name
