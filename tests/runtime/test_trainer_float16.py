"""float16 training of a real model: fp32 weights, and gradients that the loss scale keeps."""

import pytest
import torch
from torch import Tensor

from ilm_compile.models import internlm2_tiny
from ilm_compile.partitioning import parallelize
from ilm_compile.runtime import LossScaler, Parallel, Trainer

VOCAB, SEQ, ROWS, MICROBATCHES = 32, 16, 2, 2


def make_parallel(dtype: torch.dtype | None) -> Parallel:
    torch.manual_seed(0)
    model = internlm2_tiny(vocab_size=VOCAB, hidden_size=32)
    spec = ((ROWS, SEQ), torch.int64)
    inputs = {"input_ids": spec, "labels": spec}
    return parallelize(
        model, example_inputs=inputs, num_microbatches=MICROBATCHES, dtype=dtype, kernels="torch"
    )


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS * MICROBATCHES, SEQ)
    ids = torch.randint(VOCAB, shape, generator=generator)
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


def losses(dtype: torch.dtype | None, scaler: LossScaler | None) -> tuple[list[float], Trainer]:
    trainer = Trainer(make_parallel(dtype), lr=1e-3, scaler=scaler)
    history = trainer.fit([batch(0)] * 8, 8, progress=False)
    return [metrics.loss for metrics in history], trainer


def test_float16_with_a_loss_scale_trains_like_float32() -> None:
    plain, _ = losses(None, None)
    scaled, trainer = losses(torch.float16, LossScaler(initial_scale=2.0**10))
    assert trainer.num_skipped_steps == 0
    assert scaled == pytest.approx(plain, rel=3e-3)
    assert scaled != plain
    assert plain[-1] < plain[0]
    for _, parameter in trainer.parallel.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_a_scale_that_overflows_float16_falls_until_steps_are_taken() -> None:
    scaler = LossScaler(initial_scale=2.0**24, hysteresis=1)
    _, trainer = losses(torch.float16, scaler)
    assert 0 < trainer.num_skipped_steps < 8
    assert scaler.scale == 2.0 ** (24 - trainer.num_skipped_steps)


def test_small_gradients_need_the_scale() -> None:
    """As small as those of a loss of millions of tokens: 2**-24 of the loss, and brought back."""
    small = 2.0**-24

    def norm(scale: float) -> float:
        parallel = make_parallel(torch.float16)
        parallel.execute_schedule(batch(0), loss_scale=scale)
        return (parallel.grad_norm() / scale).item()

    assert norm(small) < 0.5 * norm(1.0)
    assert norm(small * 2.0**24) == pytest.approx(norm(2.0**10), rel=1e-2)
