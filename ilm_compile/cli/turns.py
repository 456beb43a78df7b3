"""A start that every rank refuses is told once a node."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ilm_compile.config import ConfigError
from ilm_compile.training import StartError

_TURN_S = 5.0  # the first rank of a node speaks first; the launcher then ends the others


@contextmanager
def first_of_node_speaks() -> Iterator[None]:
    """Hold back an error that all ranks have alike, other than on the first rank of the node."""
    try:
        yield
    except (ConfigError, StartError):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_TURN_S)
        raise
