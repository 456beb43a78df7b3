"""A loss is trained in micro-batches only if their average is the loss of the whole batch."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ilm_compile
from ilm_compile import PlanError
from tests.sharding.losses import (
    CLASSES,
    ROWS,
    SEQ,
    WIDTH,
    Loss,
    batch,
    check,
    chunks,
    counted,
    flat,
    log_probabilities,
    make,
    mean,
    rows_of,
    total,
)


def partition(loss: Loss, rows: int = 2, norm: nn.Module | None = None, **plan: int):
    return ilm_compile.partition(make(loss, norm), example_inputs=rows_of(rows), **plan)


def mean_of_chunk_means(s: Tensor, t: Tensor) -> Tensor:
    pairs = chunks(s, t, s.shape[0] * SEQ // 2)
    return torch.stack([F.cross_entropy(*pair) for pair in pairs]).mean()


def first_chunk_twice(s: Tensor, t: Tensor) -> Tensor:
    sums = [F.cross_entropy(*pair, reduction="sum") for pair in chunks(s, t, 3)]
    return sum([sums[0], *sums]) / counted(t).sum()


def chunk_left_out(s: Tensor, t: Tensor) -> Tensor:
    pairs = chunks(s, t, 3)[:-1]
    return sum(F.cross_entropy(*pair, reduction="sum") for pair in pairs) / counted(t).sum()


def halves(s: Tensor, t: Tensor) -> Tensor:
    """Chosen answers in the first half of the batch, rejected ones in the second."""
    chosen, rejected = log_probabilities(s, t).sum(-1).view(2, -1)
    return -F.logsigmoid(chosen - rejected).mean()


def in_batch_contrast(s: Tensor, t: Tensor) -> Tensor:
    vectors = s.mean(1)
    return F.cross_entropy(vectors @ vectors.T, torch.arange(s.shape[0], device=s.device))


def counts_of_counts(s: Tensor, t: Tensor) -> Tensor:
    weight = counted(t) / counted(t).sum()
    return (log_probabilities(s, t) * weight).sum() / weight.square().sum()


def one_or_the_other(s: Tensor, t: Tensor) -> Tensor:
    other = torch.ones((), dtype=s.dtype, device=s.device)
    return torch.where(counted(t).sum() > 5, total(s, t), other)


REFUSED: dict[str, tuple[Loss, str]] = {
    "a chunk twice": (first_chunk_twice, "by the number of rows"),
    "a chunk left out": (chunk_left_out, "by the number of rows"),
    "mean of chunk means": (mean_of_chunk_means, "takes some rows"),
    "first row": (lambda s, t: mean(s[:1], t[:1]), "takes some rows"),
    "exponential": (lambda s, t: mean(s, t).exp(), "not linear in div_tensor"),
    "one over it": (lambda s, t: s.new_ones(()) / (mean(s, t) + total(s, t)), "not linear in"),
    "counts of counts": (counts_of_counts, "not linear in sum_"),
    "a sum or a number": (one_or_the_other, "not linear in"),
    "halves of the batch": (halves, "may mix the rows"),
    "contrast in the batch": (in_batch_contrast, "depends on the number of rows"),
    "root": (lambda s, t: F.mse_loss(s, s.detach() + 1).sqrt(), "not linear in mse_loss"),
}


@pytest.mark.parametrize(("loss", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_average_over_rows_is_refused_with_the_users_line(loss, reason):
    with pytest.raises(PlanError, match=rf"(?s){reason}.*losses.py:\d+") as caught:
        partition(loss, num_microbatches=2)
    assert "F.cross_entropy(logits, labels)" in str(caught.value)
    assert "num_microbatches=1 and dp=1" in str(caught.value)
    partition(loss, num_microbatches=1)


def test_data_parallel_ranks_are_micro_batches_too():
    with pytest.raises(PlanError, match="cut into 2 micro-batches"):
        partition(halves, num_microbatches=1, dp=2)
    report = ilm_compile.verify(make(halves), dp=2, example_inputs=rows_of(2))
    assert "cut into 2 micro-batches" in report.failures[0]


def row_by_row(s: Tensor, t: Tensor) -> Tensor:
    pairs = zip(s.split(1), t.split(1), strict=True)
    sums = [F.cross_entropy(a.transpose(1, 2), b, reduction="sum") for a, b in pairs]
    return sum(sums) / counted(t).sum()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_loop_over_rows_is_a_loop_over_pieces(rows):
    check_trained(make(row_by_row), rows=rows)


def test_a_count_that_is_another_one_for_a_single_row_is_refused():
    def loss(s: Tensor, t: Tensor) -> Tensor:
        mask = counted(t) if len(t) > 1 else t >= 0
        return total(s, t) / mask.sum()

    with pytest.raises(PlanError, match="for one row is written in another way"):
        partition(loss, rows=1, num_microbatches=8)
    check_trained(make(loss), rows=2)


def test_one_row_in_each_micro_batch_makes_no_pair():
    with pytest.raises(PlanError, match=r"cannot be traced|takes some rows"):
        partition(ACCEPTED["pairs, in turns"], rows=1, num_microbatches=8)


class Scaled(nn.Module):
    """Two losses with trained factors, as multi-task training weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.logs = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scores = self.head(x)
        losses = torch.stack([mean(scores, labels), scores.square().mean()])
        return (losses * (-self.logs).exp() + self.logs).sum()


def teacher(s: Tensor) -> Tensor:
    return (2 * s.detach() + 1).softmax(-1)


def own_position(s: Tensor, t: Tensor) -> Tensor:
    last = counted(t).int().argmax(-1)
    picked = s[torch.arange(s.shape[0], device=s.device), last]
    return F.mse_loss(picked, torch.ones_like(picked))


def pairs_in_turns(s: Tensor, t: Tensor) -> Tensor:
    scores = log_probabilities(s, t).sum(-1)
    return -F.logsigmoid(scores[0::2] - scores[1::2]).mean()


def shifted(s: Tensor, t: Tensor) -> Tensor:
    """As Hugging Face writes it: for one row, torch leaves `contiguous` out."""
    targets = t[:, 1:].contiguous()
    return total(s[:, :-1].contiguous(), targets) / counted(targets).sum()


ACCEPTED: dict[str, Loss] = {
    "label smoothing": lambda s, t: F.cross_entropy(*flat(s, t), label_smoothing=0.1),
    "other ignore_index": lambda s, t: F.cross_entropy(
        *flat(s, t.masked_fill(t == -100, 2)), ignore_index=2
    ),
    "difference of two": lambda s, t: mean(s, t) - 0.3 * mean(s[:, :-1], t[:, 1:]),
    "classes in dim 1": lambda s, t: F.cross_entropy(s.transpose(1, 2), t),
    "sequence first": lambda s, t: mean(s.transpose(0, 1), t.transpose(0, 1)),
    "a constant beside it": lambda s, t: 2 * mean(s, t) + 1.5,
    "z-loss over all": lambda s, t: mean(s, t) + 0.01 * s.logsumexp(-1).square().mean(),
    "mse": lambda s, t: F.mse_loss(s, s.detach() + 1),
    "bce": lambda s, t: F.binary_cross_entropy_with_logits(
        s, F.one_hot(t.clamp(min=0), CLASSES).to(s.dtype)
    ),
    "batchmean": lambda s, t: F.kl_div(s.log_softmax(-1), teacher(s), reduction="batchmean"),
    "probabilities": lambda s, t: F.cross_entropy(s.flatten(0, 1), teacher(s).flatten(0, 1)),
    "probabilities in dim 1": lambda s, t: F.cross_entropy(
        s.transpose(1, 2), teacher(s).transpose(1, 2)
    ),
    "distillation": lambda s, t: (
        0.5 * mean(s, t) - 0.5 * (teacher(s) * s.log_softmax(-1)).sum(-1).mean()
    ),
    "sum / rows": lambda s, t: -log_probabilities(s, t).sum() / s.shape[0],
    "sum / elements, sequence first": lambda s, t: (
        s.transpose(0, 1).reshape(-1, CLASSES).square().sum() / s.numel()
    ),
    "pairs, in turns": pairs_in_turns,
    "shifted": shifted,
    "parts of one row": lambda s, t: -F.logsigmoid(s[..., 0].mean(1) - s[..., 1].mean(1)).mean(),
    "cosines": lambda s, t: (1 - F.cosine_similarity(s, torch.ones_like(s), dim=-1)).mean(),
    "its own position": own_position,
}


def check_trained(model: nn.Module, rows: int) -> None:
    whole = batch()
    parallel = ilm_compile.parallelize(
        model, num_microbatches=ROWS // rows, example_inputs=rows_of(rows)
    )
    loss = parallel.execute_schedule(whole)
    check(model, whole, loss, parallel.full_gradients())


@pytest.mark.parametrize("loss", ACCEPTED.values(), ids=ACCEPTED)
def test_an_average_over_rows_is_trained_in_unequal_micro_batches(loss):
    check_trained(make(loss), rows=2)


@pytest.mark.parametrize("name", ["mse", "sum / rows", "batchmean", "shifted"])
def test_micro_batches_of_one_row_are_trained(name):
    check_trained(make(ACCEPTED[name]), rows=1)


def test_factors_that_are_trained_are_the_same_in_every_micro_batch():
    torch.manual_seed(0)
    check_trained(Scaled().double(), rows=2)


BESIDE: dict[str, Loss] = {
    "largest score": lambda s, t: mean(s, t) + 0.1 * s.max(),
    "balance": lambda s, t: mean(s, t) + 0.1 * s.softmax(-1).mean((0, 1)).square().sum(),
}


@pytest.mark.parametrize("loss", BESIDE.values(), ids=BESIDE)
def test_a_term_that_sees_no_labels_is_of_one_micro_batch_with_one_warning(loss):
    program = partition(loss, num_microbatches=2)
    (warning,) = [w for w in program.warnings if w.startswith("loss:")]
    assert re.search(r"per micro-batch.*losses.py:\d+", warning)
    assert not [w for w in partition(loss).warnings if w.startswith("loss:")]


class Balanced(nn.Module):
    """A loss that is divided by a count, and a term of one micro-batch that is by another."""

    def __init__(self, *, same: bool) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.same = same

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return sum(self.terms(x, labels))

    def terms(self, x: Tensor, labels: Tensor) -> list[Tensor]:
        scores, mask = self.head(x), x[..., 0] > 0
        count = mask.sum().clamp(min=1)
        shares = (scores.softmax(-1) * mask.unsqueeze(-1)).sum((0, 1)) / count
        main = total(scores, labels) / (count if self.same else counted(labels).sum())
        return [main, shares.square().sum()]


def test_a_term_of_one_micro_batch_is_divided_by_its_own_count():
    model, whole = Balanced(same=False).double(), batch()
    parallel = ilm_compile.parallelize(model, num_microbatches=4, example_inputs=rows_of(2))
    parts = [{n: value[i : i + 2] for n, value in whole.items()} for i in range(0, ROWS, 2)]
    beside = torch.stack([model.terms(**part)[1] for part in parts]).mean()
    expected = model.terms(**whole)[0] + beside
    torch.testing.assert_close(parallel.execute_schedule(whole), expected.detach())


def test_a_count_that_both_need_is_refused():
    with pytest.raises(PlanError, match=r"of the whole batch where.*clamp.*test_loss_terms.py:\d+"):
        ilm_compile.partition(Balanced(same=True), num_microbatches=4, example_inputs=rows_of(2))


def test_other_outputs_are_of_one_micro_batch():
    class Tells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            count = counted(labels).sum()
            loss = total(self.head(x), labels) / count
            return {"loss": loss, "count": count, "share": loss}

    program = ilm_compile.partition(Tells().double(), num_microbatches=4, example_inputs=rows_of(2))
    loss, count, share = program.outputs
    assert count.target is torch.ops.aten.sum.default
    assert loss.args[0] is share


def test_a_norm_over_the_rows_is_warned_of():
    norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)
    program = partition(mean, norm=norm, num_microbatches=2)
    (warning,) = [w for w in program.warnings if w.startswith("loss:")]
    assert "batch_norm" in warning


def test_a_norm_written_by_hand_is_warned_of():
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    program = partition(mean, norm=Centred(), num_microbatches=2)
    (warning,) = [w for w in program.warnings if w.startswith("loss:")]
    assert re.search(r"test_loss_terms.py:\d+", warning)


@pytest.mark.parametrize("norm", [nn.LayerNorm(WIDTH), nn.Dropout(0.5)], ids=["layer", "dropout"])
def test_a_model_that_keeps_rows_apart_is_not_warned_of(norm):
    assert not partition(mean, norm=norm, num_microbatches=2).warnings


def padded(s: Tensor, t: Tensor) -> Tensor:
    return mean(F.pad(s, (0, 0, 1, 0)), F.pad(t, (1, 0), value=-100)) + F.pad(s, (1, 1)).mean()


def test_padding_of_other_dimensions_keeps_rows_apart():
    assert not partition(padded, num_microbatches=2).warnings


def test_a_constant_with_rows_counts_them():
    def loss(s: Tensor, t: Tensor) -> Tensor:
        return mean(s, t) * torch.ones(s.shape[0], device=s.device, dtype=s.dtype).sum()

    with pytest.raises(PlanError, match="not linear in"):
        partition(loss, num_microbatches=2)
