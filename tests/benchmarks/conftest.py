"""One world for the folder."""

from collections.abc import Iterator

import pytest

from tests.support.world import World


@pytest.fixture(scope="package")
def world2() -> Iterator[World]:
    """Two gloo processes."""
    with World(2) as world:
        yield world
