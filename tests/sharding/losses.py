"""A small model, a batch whose rows have unequal numbers of targets, and ways to write a loss."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, WIDTH, ROWS, SEQ, BOUND = 5, 4, 8, 6, 1e-10
Loss = Callable[[Tensor, Tensor], Tensor]


class Tagger(nn.Module):
    """Class scores of every position, and any loss of them."""

    def __init__(self, loss: Loss, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.norm = norm or nn.Identity()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = self.norm(self.body(x).flatten(0, 1)).unflatten(0, (-1, SEQ))
        return self.loss(self.head(hidden), labels)


class Distilled(nn.Module):
    """Learns from a frozen model, where there is a target."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(WIDTH, CLASSES)
        self.teacher = nn.Linear(WIDTH, CLASSES).requires_grad_(False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scores = self.student(x)
        wanted = self.teacher(x).softmax(-1)
        losses = F.kl_div(scores.log_softmax(-1), wanted, reduction="none").sum(-1)
        mask = counted(labels)
        return mean(scores, labels) + 0.5 * (losses * mask).sum() / mask.sum()


class InChunks(nn.Module):
    """Never has the scores of all tokens at once; counts as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden, count = self.body(x).tanh().flatten(0, 1), 0
        loss = torch.zeros((), dtype=x.dtype, device=x.device)
        for some, targets in zip(hidden.split(5), labels.flatten().split(5), strict=True):
            loss = loss + F.cross_entropy(self.head(some), targets, reduction="sum")
            count = count + counted(targets).sum()
        return loss / count


class Weighed(nn.Module):
    """Class weights in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(weight=torch.linspace(0.5, 1.5, CLASSES))

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.loss(*flat(scores, labels))


def make(loss: Loss | nn.Module, norm: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return Tagger(loss, norm).double()


def batch(rows: int = ROWS) -> dict[str, Tensor]:
    """Of every eight rows the first two have no target at all, later ones have more and more."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (rows, SEQ), generator=generator)
    for row in range(rows):
        labels[row, : (rows - 1 - row) % 8] = -100
    return {
        "x": torch.randn(rows, SEQ, WIDTH, dtype=torch.float64, generator=generator),
        "labels": labels,
    }


def rows_of(rows: int) -> dict[str, Tensor]:
    return {name: value[:rows] for name, value in batch().items()}


def check(model: nn.Module, whole: Mapping[str, Tensor], loss: Tensor, gradients) -> None:
    """Loss and gradients are those of the model on the whole batch in one piece."""
    expected = model(**whole)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=BOUND, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < BOUND, name  # false for nan


def flat(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return scores.flatten(0, 1), labels.flatten()


def mean(s: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(*flat(s, t))


def total(s: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(*flat(s, t), reduction="sum")


def each(s: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(*flat(s, t), reduction="none")


def counted(t: Tensor) -> Tensor:
    return t != -100


def log_probabilities(s: Tensor, t: Tensor) -> Tensor:
    """Of every target, 0 where there is none."""
    picked = s.log_softmax(-1).gather(-1, t.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked * counted(t)


def weights(s: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, CLASSES, dtype=s.dtype, device=s.device)


def masked_z_loss(s: Tensor, t: Tensor) -> Tensor:
    z = (s.logsumexp(-1).square() * counted(t)).sum() / counted(t).sum()
    return mean(s, t) + 0.01 * z


def picked_weights(s: Tensor, t: Tensor) -> Tensor:
    weight = weights(s)[t.clamp(min=0)] * counted(t)
    return -(log_probabilities(s, t) * weight).sum() / weight.sum()


def by_frequency(s: Tensor, t: Tensor) -> Tensor:
    """Classes that are rare in the batch weigh more."""
    frequency = (F.one_hot(t.clamp(min=0), CLASSES) * counted(t).unsqueeze(-1)).sum((0, 1))
    return F.cross_entropy(*flat(s, t), weight=1 / (1 + frequency).to(s.dtype))


def chunks(s: Tensor, t: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    scores, labels = flat(s, t)
    return list(zip(scores.split(size), labels.split(size), strict=True))


def chunked(s: Tensor, t: Tensor) -> Tensor:
    return sum(F.cross_entropy(*pair, reduction="sum") for pair in chunks(s, t, 5)) / (
        counted(t).sum()
    )


def chunks_together(s: Tensor, t: Tensor) -> Tensor:
    losses = [F.cross_entropy(2 * a, b, reduction="none") for a, b in chunks(s, t, 4)]
    return (torch.cat(losses) * counted(t).flatten()).sum() / counted(t).sum()


def if_any(s: Tensor, t: Tensor) -> Tensor:
    count = counted(t).sum()
    nothing = torch.zeros((), dtype=s.dtype, device=s.device)
    return torch.where(count > 0, total(s, t) / count, nothing)


def pairs(s: Tensor, t: Tensor) -> Tensor:
    both = log_probabilities(s, t).sum(-1).view(-1, 2)
    return -F.logsigmoid(both[:, 0] - both[:, 1]).mean()


def several(s: Tensor, t: Tensor) -> Tensor:
    shifted = F.nll_loss(s[:, :-1].flatten(0, 1).log_softmax(-1), t[:, 1:].flatten())
    return mean(s, t) + 0.5 * shifted + 1e-3 * total(s, t) + 0.1 * s.square().mean() + 1


# The loss of the whole batch, however it is cut. The numbers in a batch that some divide by, as
# `num_items_in_batch` of Hugging Face's trainer, are of the whole batch.
EQUAL: dict[str, Callable[[], nn.Module]] = {
    name: lambda loss=loss: make(loss)
    for name, loss in {
        "mean": mean,
        "nll_loss": lambda s, t: F.nll_loss(F.log_softmax(s.flatten(0, 1), -1), t.flatten()),
        "sum / count": lambda s, t: total(s, t) / counted(t).sum(),
        "sum * (1 / count)": lambda s, t: total(s, t) * (1 / (counted(t).sum() + 1e-6)),
        "sum / root of the count": lambda s, t: total(s, t) / counted(t).sum().to(s.dtype).sqrt(),
        "gather and mask": lambda s, t: -log_probabilities(s, t).sum() / counted(t).sum(),
        "none * mask": lambda s, t: (
            (each(s, t) * counted(t).flatten()).sum() / counted(t).sum().clamp(min=1)
        ),
        "mean * mask / mean of mask": lambda s, t: each(s, t).mean() / counted(t).double().mean(),
        "class weights": lambda s, t: F.cross_entropy(*flat(s, t), weight=weights(s)),
        "class weights in a buffer": Weighed(),
        "class weights, smoothed": lambda s, t: F.cross_entropy(
            *flat(s, t), weight=weights(s), label_smoothing=0.1
        ),
        "class weights, picked": picked_weights,
        "class weights by frequency": by_frequency,
        "masked z-loss": masked_z_loss,
        "sum": total,
        "sum / constant": lambda s, t: total(s, t) / 100,
        "mean times rows": lambda s, t: mean(s, t) * s.shape[0],
        "mean of each row": lambda s, t: (
            -log_probabilities(s, t).sum(1) / counted(t).sum(1).clamp(min=1)
        ).mean(),
        "0 without targets": if_any,
        "pairs": pairs,
        "several": several,
        "chunked": chunked,
        "chunks together": chunks_together,
    }.items()
} | {"distillation": lambda: Distilled().double(), "chunked head": lambda: InChunks().double()}
