"""Numbers of bytes as people write them: "80GiB"."""

from __future__ import annotations

import re

from ilm_compile.errors import PlanError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "": 1}
_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?b|)", re.IGNORECASE)


def read_bytes(given: str | int, what: str) -> int:
    """Return the bytes that are meant. Raises `PlanError` naming `what` for anything else."""
    found = _FORM.fullmatch(str(given).strip())
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise PlanError(f"{what} must be a number of bytes as in 80GiB, got {given!r}")
    return size


def shown_bytes(size: float) -> str:
    """Return bytes for people: "1.50 GiB"."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
