"""A random order of many rows of which any part can be had without the rest.

A Feistel network (Luby and Rackoff, SIAM J. Comput. 1988) permutes the numbers below a power of
four; one that comes out too large is sent through again until it is not (Black and Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002). The round function is the finalizer of
SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Rows = np.ndarray[Any, np.dtype[np.int64]]
_Words = np.ndarray[Any, np.dtype[np.uint64]]
ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15


class KeyedOrder:
    """The numbers 0 to `size` - 1 in an order drawn from `key`; takes no memory."""

    def __init__(self, size: int, *key: int) -> None:
        self._size = size
        self._half = max(1, -(-(size - 1).bit_length() // 2))  # bits on each side
        words = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
        self._keys = words.astype(np.uint64)

    def __getitem__(self, places: Rows) -> Rows:
        """Return what stands at each of `places`, which must be below the size."""
        values = self._permuted(places.astype(np.uint64))
        while (outside := values >= self._size).any():
            values[outside] = self._permuted(values[outside])
        return values.astype(np.int64)

    def _permuted(self, values: _Words) -> _Words:
        half, low = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = values >> half, values & low
        for key in self._keys:
            left, right = right, left ^ (_mixed(right, key) & low)
        return (left << half) | right


def _mixed(values: _Words, key: np.uint64) -> _Words:
    x = values * np.uint64(_GOLDEN) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
