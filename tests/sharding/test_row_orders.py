"""Rows of a batch that meet through integers: told where a micro-batch gives something else.

Each model has a plain mean cross entropy, so it is trained in micro-batches either way.
"""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ilm_compile
from tests.sharding.losses import check

VOCAB, WIDTH, EXPERTS, TOP, ROWS, SEQ = 13, 4, 3, 2, 8, 6
Mix = Callable[["Model", Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Embeds ids, lets `mix` do something to the rows, and predicts the labels."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.mix = mix

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.mix(self, self.table(ids), ids)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())

    def routes(self, h: Tensor, k: int = TOP) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (n, d), and of each the weights (n, k) and numbers (n, k) of its experts."""
        x = h.flatten(0, 1)
        return x, *self.gate(x).softmax(-1).topk(k, -1)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(1, VOCAB, (2, ROWS, SEQ), generator=generator)
    labels[0, 1:] = -100
    return {"ids": ids, "labels": labels}


def make(mix: Mix) -> Model:
    torch.manual_seed(0)
    return Model(mix).double()


def shown(h: Tensor, integers: Tensor) -> Tensor:
    """Activations that see some integers of (rows, seq), or of (rows * seq)."""
    return h * (1 + integers.reshape(h.shape[:2]).unsqueeze(-1).to(h.dtype).sin())


def capacity_by_cumsum(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    x, weights, chosen = m.routes(h, 1)
    mask = F.one_hot(chosen[:, 0], EXPERTS)
    place = ((mask.cumsum(0) - 1) * mask).sum(-1)
    return (x * (weights * (place < 3).unsqueeze(-1))).view_as(h)


def capacity_by_sort(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    x, weights, chosen = m.routes(h, 1)
    expert = chosen[:, 0]
    order = expert.argsort(stable=True)
    counts = torch.histc(expert.double(), EXPERTS, 0, EXPERTS - 1).long()
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(x), device=x.device) - starts[expert[order]]
    kept = torch.zeros_like(expert).index_put((order,), (place < 3).long())
    return (x * (weights * kept.unsqueeze(-1))).view_as(h)


def frequency_of_chosen(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    chosen = m.routes(h)[2]
    return shown(h, F.one_hot(chosen, EXPERTS).sum((0, 1))[chosen[:, 0]])


def expert_choice(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    x = h.flatten(0, 1)
    tokens = m.gate(x)[:, 0].topk(3, 0).indices
    return x.index_add(0, tokens, x[tokens] @ m.experts[0]).view_as(h)


def sorted_beside_unsorted(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    x = h.flatten(0, 1)
    return (x + x[ids.flatten().argsort(stable=True)]).view_as(h)


def batch_attention(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    x = h.flatten(1)
    return ((x @ x.T).softmax(-1) @ x).view_as(h)


def batch_sdpa(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    x = h.transpose(0, 1)
    return F.scaled_dot_product_attention(x, x, x).transpose(0, 1)


def sorted_one_way_back_another(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    x = h.flatten(0, 1)
    there, back = ids.flatten().argsort(stable=True), (7 * ids % 11).flatten().argsort(stable=True)
    return (x + x[there][back.argsort()]).view_as(h)


TOLD: dict[str, Mix] = {
    "cumsum": lambda m, h, ids: shown(h, ids.cumsum(0)),
    "cumsum over all tokens": lambda m, h, ids: shown(h, ids.flatten().cumsum(0)),
    "number of a row": lambda m, h, ids: shown(h, (ids > 6).cumsum(0)),
    "rank of a token": lambda m, h, ids: shown(h, ids.flatten().argsort(stable=True).argsort()),
    "place in the order": lambda m, h, ids: shown(h, ids.flatten().argsort(stable=True)),
    "frequency of chosen": frequency_of_chosen,
    "largest": lambda m, h, ids: shown(h, ids + ids.amax(0)),
    "any": lambda m, h, ids: shown(h, ids * (ids > 9).any(0)),
    "row before": lambda m, h, ids: shown(h, ids == ids.roll(1, 0)),
    "row before, activations": lambda m, h, ids: h + h.roll(1, 0),
    "other end": lambda m, h, ids: h + h.flip(0),
    "capacity by cumsum": capacity_by_cumsum,
    "capacity by sort": capacity_by_sort,
    "expert choice": expert_choice,
    "sorted beside unsorted": sorted_beside_unsorted,
    "sorted one way, back another": sorted_one_way_back_another,
    "attention over rows": batch_attention,
    "attention over rows, fused": batch_sdpa,
}


def dropless(m: Model, h: Tensor, ids: Tensor, back: str) -> Tensor:
    """Rows sorted by expert, computed, weighed and put back."""
    x, weights, chosen = m.routes(h)
    expert = chosen.flatten()
    order = expert.argsort(stable=True)
    rows = x[order // TOP].unsqueeze(1)
    out = (rows @ m.experts[expert[order]]).squeeze(1) * weights.flatten()[order].unsqueeze(-1)
    if back == "index_add":
        return torch.zeros_like(x).index_add(0, order // TOP, out).view_as(h)
    if back == "scatter_add":
        places = (order // TOP).unsqueeze(-1).expand_as(out)
        return torch.zeros_like(x).scatter_add(0, places, out).view_as(h)
    if back == "argsort":
        out = out[order.argsort()]
    else:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        out = out[inverse]
    return out.view(-1, TOP, WIDTH).sum(1).view_as(h)


def token_numbers(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    """As transformers wrote it: a constant says which token each row is of."""
    x, weights, chosen = m.routes(h)
    token = torch.arange(len(x), device=x.device).unsqueeze(1).expand(-1, TOP).reshape(-1)
    order = chosen.flatten().argsort(stable=True)
    out = x[token[order]] * weights.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, token[order], out).view_as(h) + x[token][::2].view_as(h)


def one_hot_routes(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    x, weights, chosen = m.routes(h)
    shares = (F.one_hot(chosen, EXPERTS) * weights.unsqueeze(-1)).sum(1)
    return torch.einsum("te,td,edf->tf", shares, x, m.experts).view_as(h)


def documents(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    """Attention within documents that end at token 1, none sees another."""
    number = (ids == 1).cumsum(1)
    same = number.unsqueeze(1) == number.unsqueeze(2)
    return F.scaled_dot_product_attention(h, h, h, attn_mask=same.tril())


def packed(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    """Positions within documents that end where the row's first ids, in order, say."""
    ends = ids[:, :2].cumsum(1)
    here = torch.arange(SEQ, device=h.device).expand(len(h), -1).contiguous()
    number = torch.searchsorted(ends, here, right=True)
    starts = F.pad(ends, (1, 0)).gather(1, number)
    return shown(h, here - starts)


def places(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    """Position ids as Hugging Face finds them: of the tokens that are no padding."""
    mask = (ids != 2).long()
    return shown(h, (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1))


def last_token(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    last = (ids != 2).sum(-1, keepdim=True) - 1
    return h + h.gather(1, last.unsqueeze(-1).expand(-1, -1, WIDTH))


def assigned(m: Model, h: Tensor, ids: Tensor) -> Tensor:
    ids = ids.clone()
    ids[ids > 9] = 3
    return shown(h, ids.unfold(1, 2, 1).sum(-1).new_zeros(len(ids), 1) + ids)


SILENT: dict[str, Mix] = {
    "assigned under a mask": assigned,
    "position ids": places,
    "counted positions": lambda m, h, ids: shown(
        h, torch.arange(SEQ, device=h.device).expand(len(h), -1)
    ),
    "documents": documents,
    "packed": packed,
    "last token": last_token,
    "frequency, counted in the batch": lambda m, h, ids: shown(
        h, F.one_hot(ids, VOCAB).sum((0, 1))[ids]
    ),
    "token before": lambda m, h, ids: shown(h, F.pad(ids, (1, 0))[:, :-1] == ids),
    "order within a row": lambda m, h, ids: shown(h, ids.argsort(dim=-1, stable=True)),
    "one-hot experts": one_hot_routes,
    "token numbers": token_numbers,
    **{
        f"dropless, {back}": lambda m, h, ids, back=back: dropless(m, h, ids, back)
        for back in ("index_add", "scatter_add", "argsort", "written")
    },
}


def warnings_of(mix: Mix) -> list[str]:
    example = {name: value[:2] for name, value in batch().items()}
    program = ilm_compile.partition(make(mix), example_inputs=example, num_microbatches=4)
    return [w for w in program.warnings if w.startswith("loss:")]


@pytest.mark.parametrize("name", TOLD)
def test_rows_that_meet_are_told_once_with_the_users_line(name: str) -> None:
    (warning,) = warnings_of(TOLD[name])
    assert re.search(r"per micro-batch.*test_row_orders.py:\d+", warning)
    model, whole = make(TOLD[name]), batch()
    hidden = model.mix(model, model.table(whole["ids"]), whole["ids"])
    alone = [model.mix(model, model.table(ids), ids) for ids in whole["ids"].split(2)]
    assert (hidden - torch.cat(alone)).abs().max() > 1e-3  # it is not told in vain


@pytest.mark.parametrize("name", SILENT)
def test_rows_that_stay_apart_are_trained_in_silence(name: str) -> None:
    assert not warnings_of(SILENT[name])
    model, whole = make(SILENT[name]), batch()
    model(**whole).backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)  # it may use no gate
        parameter.grad = None
    parallel = ilm_compile.parallelize(
        model,
        num_microbatches=4,
        example_inputs={name: value[:2] for name, value in whole.items()},
    )
    loss = parallel.execute_schedule(whole)
    check(model, whole, loss, parallel.full_gradients())
