"""What is sharded together, and what FSDP cannot shard."""

from typing import cast

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ilm_compile.errors import PlanError
from ilm_compile.program.plan import Plan
from ilm_compile.runtime.data_parallel import shard, units
from tests.runtime.handmade import lower_by_hand


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


def test_a_region_of_two_dtypes_is_refused() -> None:
    region = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(torch.float64))
    with pytest.raises(PlanError, match=r"one dtype .* got \['torch.float32', 'torch.float64'\]"):
        shard(region, cast(DeviceMesh, None), zero=1)
