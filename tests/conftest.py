"""Fixtures that several areas share."""

from collections.abc import Iterator

import pytest

from tests.support.world import World


@pytest.fixture(scope="module")
def world2() -> Iterator[World]:
    """Two gloo processes, kept for the tests of one module."""
    with World(2) as world:
        yield world


@pytest.fixture(scope="module")
def world4() -> Iterator[World]:
    """Four gloo processes, kept for the tests of one module."""
    with World(4) as world:
        yield world
