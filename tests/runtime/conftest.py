"""One world for all modules of this folder: starting processes is what costs time here."""

from collections.abc import Iterator

import pytest

from tests.support.world import World


@pytest.fixture(scope="package")
def world2() -> Iterator[World]:
    """Two gloo processes."""
    with World(2) as world:
        yield world


@pytest.fixture(scope="package")
def world4() -> Iterator[World]:
    """Four gloo processes."""
    with World(4) as world:
        yield world
