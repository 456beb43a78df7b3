"""The uniform plan, which joint choices are measured beside."""

from __future__ import annotations

import pytest

import ilm_compile
from benchmarks.heavy_head import MIB, UniformStages
from ilm_compile.models import internlm2_tiny
from ilm_compile.program.program import Program


def uniform(mib: float) -> Program:
    sizes = {"pp": 2, "num_microbatches": 8, "hardware": "cpu", "memory": int(mib * MIB)}
    return ilm_compile.partition(
        internlm2_tiny(),
        checkpoint="auto",
        passes=[UniformStages(num_stages=2, **sizes)],
        disable=["choose-stages"],
        **sizes,
    )


@pytest.mark.parametrize(("mib", "again"), [(100, [0, 0]), (4, [1, 1])])
def test_both_stages_have_as_many_blocks_and_repeat_as_many(mib: float, again: list[int]) -> None:
    program = uniform(mib)
    stages = [
        {n.meta["region"] for n in program.calls() if n.meta.get("stage") == s} for s in (0, 1)
    ]
    blocks = [
        [program.regions[i] for i in found if program.regions[i].is_block] for found in stages
    ]
    assert [len(found) for found in blocks] == [2, 2]
    assert [sum(region.recompute for region in found) for found in blocks] == again
