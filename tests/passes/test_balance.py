"""`balance` against trying every division."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from ilm_compile.rewrite.balance import balance


def run_costs(costs: list[float], cuts: list[int]) -> list[float]:
    return [sum(costs[a:b]) for a, b in pairwise([0, *cuts, len(costs)])]


def quality(costs: list[float], cuts: list[int]) -> tuple[float, float]:
    runs = run_costs(costs, cuts)
    return round(max(runs), 9), round(sum(run**2 for run in runs), 9)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_runs", [1, 2, 3, 5, 9])
def test_is_the_best_of_all_divisions(seed: int, num_runs: int) -> None:
    costs = np.random.default_rng(seed).integers(1, 12, size=9).astype(float).tolist()
    best = min(quality(costs, list(c)) for c in combinations(range(1, 9), num_runs - 1))
    assert quality(costs, balance(costs, num_runs)) == best


def test_evens_out_the_runs_beside_the_largest() -> None:
    assert balance([9.0, 2.0, 2.0, 2.0, 2.0], 3) == [1, 3]
