"""What the floors below are told of InternEvo when the package is imported."""

from __future__ import annotations

from ilm_compile.config.dialect import learn
from ilm_compile.convert import FORMATS
from ilm_compile.internevo.config import DIALECT
from ilm_compile.internevo.weights import FORMAT


def make_known() -> None:
    """Let configs and weights of InternEvo be read wherever ours are."""
    learn(DIALECT)
    FORMATS["internlm"] = FORMAT
