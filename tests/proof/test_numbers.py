"""How far two values are apart: masks hold infinities, and gradients may hold nothing."""

from __future__ import annotations

from math import inf, isnan, nan

import pytest
import torch

from ilm_compile.proof.numbers import relative_error


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.0, 5e-13], [0.0, 0.0], 0.5),  # of the floor
        ([-inf, 3.0, 4.5], [-inf, 3.0, 4.0], 0.1),
        ([nan, 4.0], [nan, 5.0], 0.2),
        ([1e300, 1e300], [1e300, 1e300], 0.0),
        ([-inf, 1.0], [inf, 1.0], inf),
        ([2.0, 1.0], [inf, 1.0], inf),
        ([inf, 1.0], [2.0, 1.0], inf),
    ],
)
def test_equal_infinities_are_no_error(
    actual: list[float], expected: list[float], error: float
) -> None:
    values = [torch.tensor(each, dtype=torch.float64) for each in (actual, expected)]
    assert relative_error(*values) == pytest.approx(error, rel=1e-12)


def test_a_number_that_is_none_is_an_error() -> None:
    assert isnan(relative_error(torch.tensor([nan, 1.0]), torch.tensor([0.5, 1.0])))
