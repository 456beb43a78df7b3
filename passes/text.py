"""Passes as a plan has them: ``soft-cap{cap=30.0}``, the name and the options as Python literals.

Nothing is imported for it: a plan may come from anybody. The program that reads it must have
imported the module of the pass.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from ilm_compile.errors import PlanError
from ilm_compile.passes.base import Pass

_FORM = re.compile(r"([^\s{}]+)(?:\{(.*)\})?", re.DOTALL)


def read_pass(given: Pass | str) -> Pass:
    """Return the pass that is written as `str` writes it; a pass is returned as it is.

    Raises `PlanError` for another form, a name that no imported pass has or two have, and options
    that are no literals or that the pass does not take.
    """
    if isinstance(given, Pass):
        return given
    found = _FORM.fullmatch(given) if isinstance(given, str) else None
    if found is None:
        raise PlanError(f"plan: expected a pass as in 'soft-cap{{cap=30.0}}', got {given!r}")
    name, written = found[1], found[2] or ""
    kinds = [kind for kind in pass_types() if getattr(kind, "name", None) == name]
    if len(kinds) != 1:
        where = " and ".join(sorted(f"{k.__module__}.{k.__qualname__}" for k in kinds))
        raise PlanError(
            f"plan: passes: two passes are called {name!r}: {where}; give the pass itself"
            if kinds
            else f"plan: passes: no pass {name!r} is known; import the module that defines it "
            "before the plan is read, or give the pass itself"
        )
    try:
        return kinds[0](**dict(_options(written)))
    except (SyntaxError, TypeError, ValueError) as error:
        raise PlanError(f"plan: passes: {given!r} cannot be read: {error}") from None


def name_in(text: str) -> str:
    """Return the name of the pass that is written."""
    return text.partition("{")[0]


def pass_types(kind: type[Pass] = Pass) -> Iterator[type[Pass]]:
    """Yield every pass class that is imported."""
    for child in kind.__subclasses__():
        yield child
        yield from pass_types(child)


def _options(written: str) -> Iterator[tuple[str, Any]]:
    call = ast.parse(f"f({written})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("expected options as name=value")
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("expected options as name=value")
        yield keyword.arg, ast.literal_eval(keyword.value)
