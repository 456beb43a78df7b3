"""Models that nobody on this project wrote, each with a plan of four processes."""

from __future__ import annotations

import dataclasses

from benchmarks.outside.entry import Outside
from benchmarks.outside.families import FAMILIES
from benchmarks.outside.packages import PACKAGES
from benchmarks.outside.single_files import SINGLE_FILES
from benchmarks.outside.special import SPECIAL

MODELS: dict[str, Outside] = {**SINGLE_FILES, **PACKAGES, **FAMILIES, **SPECIAL}


def entry_of(name: str, layout: str = "") -> Outside:
    """Return a model of the table, under another of the layouts if one is named."""
    entry = MODELS[name]
    return dataclasses.replace(entry, layout=layout) if layout else entry
