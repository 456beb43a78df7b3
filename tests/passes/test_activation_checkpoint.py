"""Which blocks ActivationCheckpoint marks."""

import pytest

from ilm_compile.errors import PlanError
from ilm_compile.passes import ActivationCheckpoint, run_passes
from ilm_compile.program.program import Region
from ilm_compile.program.trace import trace
from tests.support.tiny_model import TinyTransformer


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(False, []), (0.0, []), (0.5, [1, 3]), (0.25, [3]), (0.75, [1, 2, 3]), (True, [0, 1, 2, 3])],
)
def test_marked_blocks_are_spread_evenly(fraction: float, expected: list[int]) -> None:
    program = trace(TinyTransformer())
    run_passes(program, [ActivationCheckpoint(fraction=fraction)])
    assert [r.name for r in program.regions if r.recompute] == [f"blocks.{i}" for i in expected]
    assert "checkpointed" in program.facts
    assert f"{len(expected)} of 4 blocks" in program.decisions[-1]


def test_number_of_blocks_does_not_suffer_from_rounding() -> None:
    program = trace(TinyTransformer(num_blocks=1))
    for percent in range(101):
        program.regions = [Region(f"blocks.{i}", is_block=True) for i in range(100)]
        ActivationCheckpoint(fraction=percent / 100).apply(program)
        assert sum(region.recompute for region in program.regions) == percent


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_refuses_what_is_no_fraction(fraction: float) -> None:
    with pytest.raises(PlanError, match=rf"fraction must be .* in \[0, 1\], got {fraction}"):
        ActivationCheckpoint(fraction=fraction)
