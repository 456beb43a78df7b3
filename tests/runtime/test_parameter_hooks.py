"""The hooks of parameters that ranks hold parts of, beside plain PyTorch."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilm_compile import parallelize
from tests.support.world import World

ROWS = torch.arange(33, dtype=torch.float64)[:, None] / 33


def decay(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    parameter.grad.add_(parameter, alpha=0.1)


class Hooked(nn.Module):
    """Vocabulary rows that neither tp nor dp divides, and one hook of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(33, 8, dtype=torch.float64)
        self.up = nn.Linear(8, 16, dtype=torch.float64)
        self.down = nn.Linear(16, 8, dtype=torch.float64)
        self.head = nn.Linear(8, 33, dtype=torch.float64)
        self.embed.weight.register_hook(lambda g: g * ROWS)
        self.up.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        self.down.weight.register_post_accumulate_grad_hook(decay)
        self.down.bias.register_hook(lambda g: g * torch.arange(8))
        self.head.weight.register_hook(lambda g: g.mul_(0.5 + ROWS))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        h = self.embed(input_ids)
        h = h + self.down(torch.tanh(self.up(h)))
        return F.cross_entropy(self.head(h).flatten(0, 1), labels.flatten())


def largest_error(rank: int, tp: int, pp: int) -> float:
    """Of all gradients of a batch of four micro-batches, of which dp ranks share."""
    ids = torch.randint(0, 33, (8, 6), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    model = Hooked()
    rows = {"input_ids": ((2, 6), torch.int64), "labels": ((2, 6), torch.int64)}
    parallel = parallelize(model, tp=tp, pp=pp, num_microbatches=tp * pp, example_inputs=rows)
    parallel.execute_schedule(batch)
    found = parallel.full_gradients()
    model(**batch).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert sorted(found) == (sorted(expected) if rank == 0 else [])
    return max((float((grad - expected[n]).abs().max()) for n, grad in found.items()), default=0.0)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (1, 1)], ids=["tp dp", "pp dp", "dp"])
def test_hooks_see_the_gradient_of_the_whole_batch(world4: World, tp: int, pp: int) -> None:
    assert max(world4.run(largest_error, tp, pp)) < 1e-14
