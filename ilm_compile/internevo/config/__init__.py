"""InternEvo's configs: its Python-style files, read without being run, and its keys in any file."""

from __future__ import annotations

from functools import partial

from ilm_compile.config.dialect import Dialect
from ilm_compile.internevo.config.defaults import differences, fill_defaults
from ilm_compile.internevo.config.keys import KEYS
from ilm_compile.internevo.config.python_file import read_config
from ilm_compile.internevo.config.reference import reference
from ilm_compile.internevo.config.translate import translate

DIALECT = Dialect(
    keys=KEYS,
    suffix=".py",
    read=read_config,
    translate=partial(translate, KEYS),
    fill_defaults=fill_defaults,
    differences=differences,
    reference=reference,
)
