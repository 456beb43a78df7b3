"""Every key of a config, ours and InternEvo's, as a page: docs/config.md is what this writes.

python -m ilm_compile.config.reference > docs/config.md
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from ilm_compile.config.dialect import known
from ilm_compile.config.model_section import FAMILIES, FROM_ELSEWHERE, HfOptions
from ilm_compile.config.options import describe, hints
from ilm_compile.config.schema import SECTIONS
from ilm_compile.config.toml_text import toml_value
from ilm_compile.models import HF

_INTRODUCTION = """# Every key of a config

Written by `python -m ilm_compile.config.reference` from `ilm_compile/config/`; a test checks it.

A config is a TOML file, or a Python-style file of InternEvo, which is read and never run. On the
command line, `--set parallel.tensor=4` goes over the file. A key without a default may be left out
unless it is *required*.
"""


def reference() -> str:
    """The page as Markdown."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _INTRODUCTION
    yield "`job_name`: text that names the run's folder below `logging.folder`.\n"
    yield from _model()
    for name, section in SECTIONS.items():
        yield f"\n## {name}\n\n{_summary(section)}\n"
        yield from _table(section)
    yield ""
    yield from known().reference()


def _model() -> Iterator[str]:
    yield "## model\n\n`type` is a name in `MODEL_INITIALIZER`; the other keys depend on it."
    for name, family in FAMILIES.items():
        keys = [
            item.name if item.default is MISSING else f"{item.name} ({toml_value(item.default)})"
            for item in fields(family)
            if item.name not in FROM_ELSEWHERE
        ]
        yield f"\n- {name}: {', '.join(keys)}"
    yield f"\n- {HF}, which need not be written beside `hf`: {_summary(HfOptions)}\n"
    yield from _table(HfOptions)


def _summary(section: Any) -> str:
    return str(section.__doc__).splitlines()[0]


def _table(section: Any) -> Iterator[str]:
    yield "| key | value | default | |\n| --- | --- | --- | --- |"
    for item in fields(section):
        value = describe(hints(section)[item.name])
        choices = item.metadata["choices"]
        if choices is not None:
            value = ", ".join(str(choice) for choice in choices)
        text = item.metadata["help"].replace("|", "\\|")
        yield f"| {item.name} | {value} | {_default(item)} | {text} |"


def _default(item: Any) -> str:
    if item.default is not MISSING:
        return "" if item.default is None else f"`{toml_value(item.default)}`"
    return "*required*" if item.default_factory is MISSING else "`{}`"


if __name__ == "__main__":
    print(reference(), end="")
