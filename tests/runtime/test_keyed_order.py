"""The order of rows: a permutation for every size, another for every key, in no memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ilm_compile.runtime.data.keyed_order import KeyedOrder


def whole(size: int, *key: int) -> list[int]:
    return KeyedOrder(size, *key)[np.arange(size)].tolist()


@pytest.mark.parametrize("size", [*range(1, 40), 64, 65, 1000, 4097])
def test_every_row_comes_once(size):
    assert sorted(whole(size, 3, 1)) == list(range(size))


def test_a_part_is_that_of_the_whole():
    places = np.array([99, 0, 41])
    assert KeyedOrder(100, 7)[places].tolist() == [whole(100, 7)[i] for i in places]


def test_keys_give_other_orders_that_are_random():
    """Two agree at few places, neighbours come from anywhere, and every part goes everywhere."""
    orders = [whole(10_000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
        assert sum(abs(a - b) == 1 for a, b in pairwise(first)) < 15
        tenths = np.array(first).reshape(10, 1000) // 1000
        counts = np.stack([np.bincount(row, minlength=10) for row in tenths])
        assert ((counts - 100) ** 2 / 90).sum() < 150  # chi-square of 81 degrees: 1 in 10^5


def test_a_few_of_ten_billion_rows_are_had_at_once():
    order = KeyedOrder(10_000_000_000, 5)
    rows = order[np.arange(9_999_999_000, 10_000_000_000)]
    assert len(set(rows.tolist())) == 1000
    assert 0 <= rows.min() < 10**9 < 9 * 10**9 < rows.max() < 10**10
