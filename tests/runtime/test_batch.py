"""What a global batch must look like, and which rows each rank takes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ilm_compile.errors import BatchError
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Input
from ilm_compile.runtime import Parallel
from ilm_compile.runtime.batch import BatchLayout
from ilm_compile.runtime.mesh import Axis
from tests.runtime.handmade import ROWS, SEQ, VOCAB, make_batch, make_model, make_parallel


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return make_parallel(Plan(num_microbatches=3), make_model())


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda b: b.pop("labels"), r"missing \['labels'\], unknown \[\]"),
    "unknown": (lambda b: b.update(mask=b["labels"]), r"missing \[\], unknown \['mask'\]"),
    "rows": (
        lambda b: b.update(input_ids=b["input_ids"][:4]),
        r"expected input_ids of shape \(6, 5\) and dtype torch.int64, got \(4, 5\).* 2 rows x "
        "3 micro-batches x 1 data-parallel ranks",
    ),
    "sequence": (
        lambda b: b.update(input_ids=b["input_ids"][:, :3]),
        r"expected input_ids of shape \(6, 5\).*got \(6, 3\)",
    ),
    "dtype": (
        lambda b: b.update(labels=b["labels"].int()),
        "expected labels .* dtype torch.int64, got .* torch.int32",
    ),
    "no targets": (
        lambda b: b["labels"].fill_(-100),
        r"expected at least one target token, got none in \['labels'\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_batch_is_refused(parallel: Parallel, case: str) -> None:
    change, message = WRONG[case]
    batch = make_batch(3 * ROWS)
    change(batch)
    with pytest.raises(BatchError, match=message):
        parallel.execute_schedule(batch)


def test_a_rank_takes_contiguous_rows_per_microbatch() -> None:
    layout = BatchLayout({"x": Input((2, 1), torch.int64)}, num_microbatches=3, dp=Axis(1, 2))
    batch = {"x": torch.arange(12).unsqueeze(1)}
    pieces = layout.split(layout.own(batch), ["x"], torch.device("cpu"))["x"]
    assert [piece.flatten().tolist() for piece in pieces] == [[6, 7], [8, 9], [10, 11]]


def test_outputs_and_labels_come_with_the_loss(parallel: Parallel) -> None:
    batch = make_batch(3 * ROWS)
    outputs, labels, loss = parallel.execute_schedule(
        batch, forward_only=True, return_output_label=True
    )
    model = make_model()
    assert outputs.shape == (3 * ROWS, SEQ, VOCAB)
    torch.testing.assert_close(outputs, model.logits(batch["input_ids"]), rtol=1e-10, atol=0)
    assert torch.equal(labels, batch["labels"])
    assert loss.item() == pytest.approx(model(**batch).item(), rel=1e-10)


def test_no_loss_on_request(parallel: Parallel) -> None:
    assert parallel.execute_schedule(make_batch(3 * ROWS), return_loss=False) is None


def test_forward_only_leaves_no_gradients(parallel: Parallel) -> None:
    parallel.zero_grad()
    parallel.execute_schedule(make_batch(3 * ROWS), forward_only=True)
    assert parallel.full_gradients() == {}


def test_gradients_add_up_until_they_are_zeroed(parallel: Parallel) -> None:
    batch = make_batch(3 * ROWS)
    parallel.zero_grad()
    parallel.execute_schedule(batch)
    once = parallel.full_gradients()
    parallel.execute_schedule(batch)
    for name, twice in parallel.full_gradients().items():
        torch.testing.assert_close(twice, 2 * once[name], rtol=1e-12, atol=0)
