"""What a config asked for that has no effect, or is done otherwise, said once at the start."""

from __future__ import annotations

import sys

from ilm_compile.config import Config
from ilm_compile.training.launch import read_place


def tell_notices(config: Config) -> None:
    """Print the notices of the config on stderr, once for the job."""
    if read_place().rank == 0:
        for notice in config.notices:
            print(f"ilm-compile: note: {notice}", file=sys.stderr)
