"""The keys of InternEvo and what it means by silence, as a part of docs/config.md."""

from __future__ import annotations

from collections.abc import Iterator

from ilm_compile.config.toml_text import toml_value
from ilm_compile.internevo.config.defaults import ALWAYS, LEFT_OUT, OF_FAMILIES
from ilm_compile.internevo.config.keys import KEYS
from ilm_compile.internevo.config.translate import Fate, Ignored, Only, To

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


def reference() -> Iterator[str]:
    """Return the lines of that part."""
    yield _THEIRS
    for key, fate in KEYS.items():
        yield f"| {key} | {_told(fate)} |"
    yield _LEFT_OUT
    for family, values in {"": LEFT_OUT | ALWAYS, **OF_FAMILIES}.items():
        for key, value in values.items():
            yield f"| {key} | {toml_value(value)} | {family} |"


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
