"""Batches of token files in training: what a small batch that is filled up is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import ilm_compile
from ilm_compile import models
from ilm_compile.runtime.data import BatchIterator, BatchRamp, TokenDataset, write_shard
from tests.support.promote import promoted_float32

SEQ, ROWS = 8, 4


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    generator = torch.Generator().manual_seed(0)
    documents = [
        torch.randint(1, 32, (length,), generator=generator).tolist() for length in range(3, 15)
    ]
    write_shard(tmp_path / "a.bin", documents)
    return TokenDataset.open(tmp_path, seq_len=SEQ, vocab_size=32)


def test_a_batch_that_is_filled_up_trains_as_the_small_one(dataset: TokenDataset) -> None:
    """Loss and gradients, in batches of one, two and three rows under a plan for four."""
    filled = BatchIterator(dataset, global_batch_size=ROWS, ramp=BatchRamp(1, 1, 1))
    with promoted_float32():
        model = models.internlm2_tiny(num_layers=1, vocab_size=32, max_seq_len=SEQ).double()
        batch = next(filled)
        example = {name: tensor[:1] for name, tensor in batch.items()}
        parallel = ilm_compile.parallelize(model, example_inputs=example, num_microbatches=ROWS)
        for rows in (1, 2, 3):
            parallel.zero_grad()
            loss = parallel.execute_schedule(batch)
            assert isinstance(loss, Tensor)
            model.zero_grad()
            expected = model(**{name: tensor[:rows] for name, tensor in batch.items()})
            expected.backward()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
            for name, gradient in parallel.full_gradients().items():
                torch.testing.assert_close(
                    gradient, model.get_parameter(name).grad, rtol=1e-8, atol=1e-12, msg=name
                )
            batch = next(filled)
