"""Packed documents train as if each had been alone."""

import pytest
import torch

from ilm_compile.models import internlm2_tiny, internlm_tiny
from tests.support.models import random_tokens, randomize_

SEQ = 12
SMALL = {"num_layers": 2, "hidden_size": 32, "vocab_size": 64}
# Boundaries as the model takes them, and the same as (row, start, stop).
PER_ROW = torch.tensor([[0, 5, 12, 12], [0, 1, 8, 12]], dtype=torch.int32)
PER_ROW_DOCUMENTS = [(0, 0, 5), (0, 5, 12), (1, 0, 1), (1, 1, 8), (1, 8, 12)]
FLAT = torch.tensor([0, 5, 12, 13, 20, 24, 24], dtype=torch.int32)
models = pytest.mark.parametrize(
    "make", [internlm_tiny, internlm2_tiny], ids=["internlm", "internlm2"]
)
packings = pytest.mark.parametrize("cu_seqlens", [PER_ROW, FLAT], ids=["per row", "flattened"])


@models
@packings
def test_packed_equals_separate_documents(make, cu_seqlens):
    packed, alone = (randomize_(make(**SMALL).double()) for _ in range(2))
    input_ids, labels = random_tokens(2, SEQ, packed.config.vocab_size)
    num_targets = (labels != -100).sum().item()

    logits = packed(input_ids, cu_seqlens=cu_seqlens)
    packed(input_ids, cu_seqlens=cu_seqlens, labels=labels).backward()
    for row, start, stop in PER_ROW_DOCUMENTS:
        document = (slice(row, row + 1), slice(start, stop))
        torch.testing.assert_close(
            logits[document], alone(input_ids[document]), rtol=1e-10, atol=1e-12
        )
        targets = (labels[document] != -100).sum().item()
        if targets > 0:
            loss = alone(input_ids[document], labels=labels[document])
            (loss * (targets / num_targets)).backward()

    for mine, other in zip(packed.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-13)


def test_a_flattened_document_may_span_two_rows():
    model = randomize_(internlm2_tiny(**SMALL).double())
    input_ids, _ = random_tokens(2, SEQ, model.config.vocab_size)
    flat = model(input_ids, cu_seqlens=torch.tensor([0, 2 * SEQ]))
    one_row = model(input_ids.reshape(1, -1))
    torch.testing.assert_close(flat.reshape(1, 2 * SEQ, -1), one_row, rtol=1e-10, atol=1e-12)


def test_padding_of_the_boundaries_changes_nothing():
    model = randomize_(internlm2_tiny(**SMALL).double())
    input_ids, _ = random_tokens(1, SEQ, model.config.vocab_size)
    tight = model(input_ids, cu_seqlens=torch.tensor([[0, 5, SEQ]]))
    padded = model(input_ids, cu_seqlens=torch.tensor([[0, 5, SEQ, SEQ, SEQ]]))
    assert torch.equal(tight, padded)


def test_given_positions_are_used_as_they_are():
    model = randomize_(internlm2_tiny(**SMALL).double())
    input_ids, _ = random_tokens(2, SEQ, model.config.vocab_size)
    restarted = torch.tensor([[*range(5), *range(7)], [0, *range(7), *range(4)]])
    default = model(input_ids, cu_seqlens=PER_ROW)
    assert torch.equal(model(input_ids, restarted, PER_ROW), default)
    # Attention sees distances only: another start for every position of a document is equal too.
    torch.testing.assert_close(model(input_ids, restarted + 3, PER_ROW), default)
    assert not torch.allclose(model(input_ids, restarted * 2, PER_ROW), default)
