"""A micro-batch without a single target trains as the rows of a whole batch do that have none."""

import warnings

import pytest
import torch

import ilm_compile
from ilm_compile import BatchError, models
from ilm_compile.partitioning import make_schedule
from ilm_compile.passes import lower
from ilm_compile.proof.emulate import emulate
from tests.support.models import random_tokens, randomize_
from tests.support.promote import to_float64

ROWS, SEQ, VOCAB = 4, 16, 98
INPUTS = {name: ((1, SEQ), torch.int64) for name in ("input_ids", "labels")}


def make(vocab: int = VOCAB):
    return to_float64(randomize_(models.internlm2_tiny(num_layers=2, vocab_size=vocab)))


def batch(vocab: int = VOCAB, without: int = 2):
    """Four rows, the first `without` of them with no target."""
    input_ids, labels = random_tokens(ROWS, SEQ, vocab)
    labels[:without] = -100
    return {"input_ids": input_ids, "labels": labels}


def step(model, given, dp=1, **plan):
    program = ilm_compile.partition(
        model, example_inputs=INPUTS, num_microbatches=ROWS // dp, dp=dp, **plan
    )
    [result] = emulate(lower(program), make_schedule(program.plan), model, [given], dp=dp)
    return result


def check(model, given, result, bound):
    loss = model(**given)
    loss.backward()
    torch.testing.assert_close(result.loss.double(), loss.detach().double(), rtol=bound, atol=0)
    for name, parameter in model.named_parameters():
        error = (result.gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error <= bound, name  # false for nan


PLANS = {
    "whole": {},
    "vocabulary-parallel": {"tp": 2},
    "fused": {"tp": 2, "kernels": "triton"},
    "data-parallel": {"tp": 2, "dp": 2},
    "two stages": {"pp": 2},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_it_adds_nothing_to_loss_and_gradients(plan):
    model, given = make(), batch()
    check(model, given, step(model, given, **plan), 1e-10)


def test_nor_where_the_vocabulary_was_padded():
    model, given = make(vocab=97), batch(vocab=97)
    check(model, given, step(model, given, tp=2), 1e-10)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("tp", [1, 2])
def test_nor_in_bfloat16(tp, kernels):
    model, given = make().float(), batch()
    check(model, given, step(model, given, tp=tp, kernels=kernels, dtype=torch.bfloat16), 5e-2)


def test_a_whole_batch_without_targets_is_refused():
    parallel = ilm_compile.parallelize(make(), example_inputs=INPUTS, num_microbatches=ROWS)
    with pytest.raises(BatchError, match="expected at least one target token"):
        parallel.execute_schedule(batch(without=ROWS))


def test_a_training_passes_over_such_a_batch():
    """It ends as one without the batch, and says which step it was."""
    ended = []
    for seeds in ((0, None, 1), (0, 1)):
        parallel = ilm_compile.parallelize(make(), example_inputs=INPUTS, num_microbatches=ROWS)
        trainer = ilm_compile.Trainer(parallel, lr=1e-2)
        batches = [batch(without=ROWS if seed is None else seed) for seed in seeds]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = trainer.fit(batches, len(batches), progress=False)
        told = [str(w.message) for w in caught if "is skipped" in str(w.message)]
        assert [m.is_skipped for m in history] == [seed is None for seed in seeds]
        assert [text[:17] for text in told] == ["step 2 is skipped"] * seeds.count(None)
        ended.append(parallel.full_state_dict())
    for name, value in ended[0].items():
        torch.testing.assert_close(value, ended[1][name], rtol=0, atol=0)
