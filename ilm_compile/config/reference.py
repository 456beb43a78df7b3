"""Every key of a config, ours and InternEvo's, as a page: docs/config.md is what this writes.

python -m ilm_compile.config.reference > docs/config.md
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from ilm_compile.config.internlm import KEYS
from ilm_compile.config.internlm_defaults import ALWAYS, LEFT_OUT, OF_FAMILIES
from ilm_compile.config.model_section import FAMILIES, FROM_ELSEWHERE, HfOptions
from ilm_compile.config.options import describe, hints
from ilm_compile.config.schema import SECTIONS
from ilm_compile.config.toml_text import toml_value
from ilm_compile.config.translate import Fate, Ignored, Only, To
from ilm_compile.models import HF

_INTRODUCTION = """# Every key of a config

Written by `python -m ilm_compile.config.reference` from `ilm_compile/config/`; a test checks it.

A config is a TOML file, or a Python-style file of InternEvo, which is read and never run. On the
command line, `--set parallel.tensor=4` goes over the file. A key without a default may be left out
unless it is *required*.
"""
_THEIRS = """## Keys of InternEvo

They may stand in either kind of file. What has no effect is told when a run starts; what cannot be
honoured is an error that says what to write instead. Keys that are spelt as ours are not repeated.

| key | here |
| --- | --- |"""

_LEFT_OUT = """
## What a `.py` file leaves out

A `.py` file is a config of InternEvo, so a key that it leaves out has InternEvo's value, not the
default above; `model.type` is INTERNLM, there are as many key heads as query heads, and
`data.one_row` is on where `data.packing` is cut. `--set` goes over these too. docs/internevo.md
says what is done otherwise all the same.

| key | value | of models |
| --- | --- | --- |"""


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
    yield _THEIRS
    for key, fate in KEYS.items():
        yield f"| {key} | {_told(fate)} |"
    yield _LEFT_OUT
    for family, values in {"": LEFT_OUT | ALWAYS, **OF_FAMILIES}.items():
        for key, value in values.items():
            yield f"| {key} | {toml_value(value)} | {family} |"


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


def _told(fate: Fate) -> str:
    """What becomes of a key of theirs."""
    if isinstance(fate, To):
        return f"`{fate.path}`"
    if isinstance(fate, Ignored):
        return f"no effect: {fate.why}"
    if isinstance(fate, Only):
        allowed = " or ".join(str(value) for value in fate.values)
        return f"{f'only {allowed}' if allowed else 'refused'}: {fate.instead}"
    return fate.told


if __name__ == "__main__":
    print(reference(), end="")
