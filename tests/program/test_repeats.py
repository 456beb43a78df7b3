"""Repeated values become views, equal in value and gradient."""

from __future__ import annotations

import pytest
import torch

from ilm_compile.program.check import check_structure
from tests.program.execute import Apply, trace_and_compare

REPEATS = {
    "repeat_interleave": lambda m, x: x.repeat_interleave(3, 1),
    "repeat_interleave of the last dimension": lambda m, x: x.repeat_interleave(2, -1),
    "repeat_interleave of all": lambda m, x: x.repeat_interleave(2),
    "repeat": lambda m, x: x.repeat(2, 3),
    "repeat in new dimensions": lambda m, x: x.repeat(2, 1, 3, 1),
    "repeat once": lambda m, x: x.repeat(1, 1),
    "tile": lambda m, x: x.tile(2, 3),
    "tile of the last dimension": lambda m, x: x.tile(2),
}


@pytest.mark.parametrize("function", REPEATS.values(), ids=REPEATS)
def test_repeats_are_views(function):
    model = Apply(lambda m, x: function(m, x) * 1.5)
    program = trace_and_compare(model, model.example_inputs())
    check_structure(program)
    views = {torch.ops.aten.reshape.default, torch.ops.aten.expand.default}
    others = {node.target for node in program.calls()} - views
    assert {str(target).split(".")[1] for target in others} == {"linear", "mul", "sum"}
