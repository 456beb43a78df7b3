"""A constraint on the parameters of one layer holds there, and nowhere else."""

from __future__ import annotations

import pytest

from ilm_compile import partition
from ilm_compile.models import internlm2_tiny

ONE = "layers.1.feed_forward.w2.weight"


def placements(**keywords):
    program = partition(internlm2_tiny(num_layers=3), tp=2, **keywords)
    found = {name: str(variable.layout.on("tp")) for name, variable in program.parameters().items()}
    return found, program.warnings


@pytest.mark.parametrize("placement", ["I", "S(0)"])
def test_the_other_layers_lie_as_without_it(placement):
    free, _ = placements()
    bound, warnings = placements(constraints={ONE: placement})
    assert free[ONE] == "S(1)"
    assert bound[ONE] == placement
    block = ONE.rpartition(".feed_forward.")[0]
    rest = {name for name in free if not name.startswith(block)}
    assert {name: bound[name] for name in rest} == {name: free[name] for name in rest}
    assert not any("matches no parameter" in warning for warning in warnings)


def test_a_pattern_that_matches_no_parameter_is_named():
    near = "layers.7.feed_forward.w2.weight"
    _, (warning,) = placements(constraints={near: "I"})
    assert f"the constraint {near!r} matches no parameter" in warning
    assert ONE in warning
