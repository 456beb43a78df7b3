"""InternEvo's checkpoints: the weights of its ranks, each in a file of its own."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from ilm_compile.convert.formats import Format, llama_rules
from ilm_compile.convert.source import Source
from ilm_compile.internevo.weights.files import InternLMFiles
from ilm_compile.internevo.weights.rules import choose_rules, split_shapes


def _open(model: nn.Module, path: Path, _: Collection[str]) -> Source:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return InternLMFiles(path, shapes | split_shapes(model))


FORMAT = Format(
    _open,
    choose=lambda _, source: choose_rules(source),
    check=llama_rules,
    is_written=False,
)
