"""What is sharded together, and what FSDP cannot shard."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Variable
from ilm_compile.runtime import Mesh
from ilm_compile.runtime.data_parallel import ShardedSync, replicated, shard, units
from tests.runtime.handmade import lower_by_hand
from tests.support.world import World


def test_each_region_is_a_unit_and_the_stage_has_the_rest() -> None:
    (stage,) = lower_by_hand(Plan()).stages
    names = [unit.names for unit in units(stage)]
    assert ("embed", "scale") in names
    assert ("blocks.2.norm", "blocks.2.gate_up", "blocks.2.down") in names
    assert names[-1] == ()
    assert sorted(name for unit in names for name in unit) == sorted(stage.variables)


def test_regions_that_share_a_parameter_belong_to_the_stage() -> None:
    (stage,) = lower_by_hand(Plan(), tied=True).stages
    last = list(units(stage))[-1]
    assert last.module is stage.module
    assert set(last.names) == {"embed", "scale", "frozen"}


def sum_over_ranks(rank: int, dtype: torch.dtype, zero: int = 1, late: bool = False) -> float:
    """Two micro-batches on each rank, reduced once; the gradient of a weight that sees 1 + rank.

    late: after the last backward, not in it.
    """
    mesh = Mesh.create(Plan()).device_mesh
    assert mesh is not None
    module = nn.Linear(1, 1, bias=False, dtype=dtype)
    shard(module, mesh["dp"], zero=zero)
    (weight,) = module.parameters()
    sync = ShardedSync(module, zero=zero)
    x = torch.full((1, 1), 1.0 + rank, dtype=dtype)
    sync.defer()
    module(x).sum().backward()
    if not late:
        sync.resume()
    module(x).sum().backward()
    if late:
        assert weight.grad is None
        sync.reduce()
    assert isinstance(weight.grad, DTensor)
    return weight.grad.full_tensor().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_summed_over_ranks_and_microbatches(
    world2: World, dtype: torch.dtype
) -> None:
    assert world2.run(sum_over_ranks, dtype) == [6.0, 6.0]


@pytest.mark.parametrize("zero", [1, 3])
def test_gradients_can_be_reduced_after_the_last_backward(world2: World, zero: int) -> None:
    """By a private method of FSDP2: a torch that changes it fails here."""
    assert world2.run(sum_over_ranks, torch.float32, zero, True) == [6.0, 6.0]


def variable(name: str, shape: tuple[int, ...], dtype: torch.dtype, *, trained: bool) -> Variable:
    return Variable(name, shape, dtype, True, trained)


def test_scalars_and_what_is_trained_in_a_rarer_dtype_are_held_whole() -> None:
    variables = [
        variable("weight", (8, 8), torch.bfloat16, trained=True),
        variable("norm", (8,), torch.float32, trained=True),
        variable("frozen", (64, 64), torch.float32, trained=False),
        variable("scale", (), torch.bfloat16, trained=True),
        variable("frozen_scale", (), torch.bfloat16, trained=False),
        Variable("table", (), torch.float32, False, False),
    ]
    found = replicated({each.name: each for each in variables})
    assert found == {"norm", "scale", "frozen_scale"}
