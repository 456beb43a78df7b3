"""Losses over a sharded vocabulary: nothing is gathered, and training stays equal."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ilm_compile import partition
from ilm_compile.partitioning import make_schedule
from ilm_compile.passes import lower
from ilm_compile.program.collectives import redistribute
from ilm_compile.proof.compare import compare
from ilm_compile.proof.emulate import emulate
from ilm_compile.proof.reference import single_device_step
from tests.support.batches import random_batch

VOCAB, HIDDEN, ROWS, SEQ = 32, 8, 2, 6
EXAMPLE = {name: ((ROWS, SEQ), torch.int64) for name in ("input_ids", "labels")}


def z_loss(x, labels):
    flat, target = x.flatten(0, 1), labels.flatten()
    z = x.logsumexp(-1).square()
    return F.cross_entropy(flat, target) + 0.1 * (z * (labels != -100)).sum() / ROWS / SEQ


def of_each_token(x, labels):
    losses = F.cross_entropy(x.transpose(1, 2), labels, reduction="none", label_smoothing=0.1)
    return losses.square().sum() / ROWS / SEQ


def log_probabilities(x, labels):
    picked = x.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(picked * (labels != -100)).sum(-1).sigmoid().mean()


def negative_log_likelihood(x, labels):
    return F.nll_loss(x.log_softmax(-1).flatten(0, 1), labels.flatten(), reduction="sum") / ROWS


def distilled(x, labels):
    return F.kl_div(x.log_softmax(-1), (2 * x.detach()).softmax(-1), reduction="batchmean")


def entropy(x, labels):
    return (x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean()


def margin(x, labels):
    return (x.amax(-1) - x.amin(-1)).mean() + F.mse_loss(x, x.detach() * 0.5)


def largest(x, labels):
    values, indices = x.max(-1)
    return values.mean() + 1e-3 * (values * indices).mean()


LOSSES = [
    *(z_loss, of_each_token, log_probabilities, negative_log_likelihood),
    *(distilled, entropy, margin, largest),
]


class Model(nn.Module):
    """A head over a vocabulary that is larger than what it reads, and a loss of it."""

    def __init__(self, loss):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.loss = loss

    def forward(self, input_ids, labels):
        return self.loss(self.head(self.embed(input_ids).tanh()), labels)


def made(loss, tp):
    """A small model, its logits sharded as those of a large one are."""
    torch.manual_seed(0)
    model = Model(loss).double()
    constraints = {"head.weight": "S(0)"}
    return model, partition(model, example_inputs=EXAMPLE, tp=tp, constraints=constraints)


def moved(program):
    """How many numbers the largest value that is moved after the head has, over all ranks."""
    nodes = list(program.calls())
    head = next(i for i, node in enumerate(nodes) if "linear" in node.name)
    sizes = [n.meta["val"].numel() for n in nodes[head:] if n.target is redistribute]
    return max(sizes, default=0)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_sharded_logits_are_not_gathered_and_training_is_equal(loss, tp):
    model, program = made(loss, tp)
    assert moved(program) <= ROWS * SEQ
    assert program.warnings == []
    batch = random_batch(program.inputs, 1, VOCAB)
    [step] = emulate(lower(program), make_schedule(program.plan), model, [batch])
    assert compare(step, single_device_step(model, batch)).describe(1e-10) == ""


def test_the_table_of_what_is_sent_has_no_logits():
    _, program = made(z_loss, 2)
    lines = program.explain().splitlines()
    assert [line for line in lines if "linear is" in line] == []
    num_bytes = ROWS * SEQ * 8  # a maximum and a sum of each token, in float64
    assert any(f"all_reduce {num_bytes} B + all_reduce {num_bytes} B" in line for line in lines)


def padded(x, labels):
    right = (x.argmax(-1) == labels).to(x.dtype).mean()
    return z_loss(x, labels) + 0.1 * x.amax(-1).mean() * (1 + right)


@pytest.mark.parametrize("tp", [2, 4])
def test_a_vocabulary_that_no_size_divides_is_padded_under_these_losses_too(tp, monkeypatch):
    monkeypatch.setitem(globals(), "VOCAB", 33)
    model, program = made(padded, tp)
    with torch.no_grad():
        model.head.bias.sub_(5)  # a class of zeros would be the largest
    assert program.variables["head.weight"].padding == -VOCAB % tp
    assert moved(program) < VOCAB  # of a mask of the classes, at most
    batch = random_batch(program.inputs, 1, VOCAB)
    [step] = emulate(lower(program), make_schedule(program.plan), model, [batch])
    assert compare(step, single_device_step(model, batch)).describe(1e-10) == ""


def running_logits(x, labels):
    return x.logcumsumexp(-1)[..., 0].mean()


def norms(x, labels):
    return F.relu(x).norm(dim=-1).mean()


@pytest.mark.parametrize(
    ("loss", "op", "why"),
    [
        (running_logits, "logcumsumexp", "has no placement rule"),
        (norms, "linalg_vector_norm", "cannot divide it"),
    ],
)
def test_an_op_that_forces_the_logits_to_be_gathered_is_named(loss, op, why):
    _, program = made(loss, 2)
    (warning,) = program.warnings
    assert f"linear (2, 6, {VOCAB}) is made whole on all 2 ranks (all_gather): aten.{op}" in warning
    assert why in warning
    assert f"{__file__.rpartition('/')[2]}:" in warning


class Distilled(nn.Module):
    """A student that learns the probabilities of a frozen teacher."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = (
            nn.Sequential(nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)) for _ in range(2)
        )
        self.teacher.requires_grad_(False)

    def forward(self, input_ids):
        with torch.no_grad():
            wanted = self.teacher(input_ids).softmax(-1)
        return F.kl_div(self.student(input_ids).log_softmax(-1), wanted, reduction="batchmean")


@pytest.mark.parametrize("tp", [2, 4])
def test_a_frozen_model_is_divided_like_a_trained_one(tp):
    torch.manual_seed(0)
    model = Distilled().double()
    example = {"input_ids": EXAMPLE["input_ids"]}
    constraints = {"*.1.weight": "S(0)"}
    program = partition(model, example_inputs=example, tp=tp, constraints=constraints)
    weights = {n: v for n, v in program.parameters().items() if len(v.shape) > 1}
    assert all(variable.layout.is_shard for variable in weights.values())
    assert moved(program) <= HIDDEN * ROWS * SEQ
    teacher = {n for n in program.calls() if not n.meta["val"].requires_grad}
    assert teacher
    batch = random_batch(program.inputs, 1, VOCAB)
    [step] = emulate(lower(program), make_schedule(program.plan), model, [batch])
    assert compare(step, single_device_step(model, batch)).describe(1e-10) == ""
