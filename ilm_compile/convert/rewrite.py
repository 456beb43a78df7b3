"""A source seen under other names and in another layout, by the rules of Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ilm_compile.convert.source import Source, Spec, read_whole
from ilm_compile.errors import IlmCompileError
from ilm_compile.models.hf_rules import IGNORED_SUFFIX, Rule
from ilm_compile.runtime.checkpoint.boxes import Box


class Joined:
    """Our tensors, made of a source of theirs.

    Raises `IlmCompileError` for a tensor that is missing, has no place or another shape.
    """

    def __init__(self, source: Source, rules: Sequence[Rule]) -> None:
        self.where = source.where
        self._source = source
        self._rules = {rule.ours: rule for rule in rules}
        self._last: tuple[str, Tensor | None] = ("", None)
        expected = {
            name: shape
            for rule in rules
            for name, shape in zip(rule.theirs, rule.their_shapes, strict=True)
        }
        check_shapes(source, expected)

    def specs(self) -> Mapping[str, Spec]:
        theirs = self._source.specs()
        return {
            name: Spec(rule.our_shape, theirs[rule.theirs[0]].dtype)
            for name, rule in self._rules.items()
        }

    def read(self, name: str, box: Box) -> Tensor:
        rule = self._rules[name]
        if rule.join is None:
            return self._source.read(rule.theirs[0], box)
        if self._last[0] != name:
            # Asked for rows after rows: what a rule joins is made once, and one at a time is kept.
            self._last = ("", None)
            parts = [read_whole(self._source, their) for their in rule.theirs]
            self._last = (name, rule.join(parts))
        assert self._last[1] is not None
        return box.of(self._last[1]).clone()


class Split:
    """Their tensors, made of a source of ours; `source` must have a tensor for every rule."""

    def __init__(self, source: Source, rules: Sequence[Rule]) -> None:
        self.where = source.where
        self._source = source
        self._rules = {
            name: (rule, index) for rule in rules for index, name in enumerate(rule.theirs)
        }
        self._last: tuple[str, tuple[Tensor, ...]] = ("", ())

    def specs(self) -> Mapping[str, Spec]:
        ours = self._source.specs()
        return {
            name: Spec(rule.their_shapes[index], ours[rule.ours].dtype)
            for name, (rule, index) in self._rules.items()
        }

    def read(self, name: str, box: Box) -> Tensor:
        rule, index = self._rules[name]
        if rule.split is None:
            return self._source.read(rule.ours, box)
        if rule.is_rowwise:
            rows = Box(
                (box.start[0], *(0 for _ in box.start[1:])), (box.sizes[0], *rule.our_shape[1:])
            )
            columns = Box((0, *box.start[1:]), box.sizes)
            return columns.of(rule.split(self._source.read(rule.ours, rows))[index]).clone()
        if self._last[0] != rule.ours:
            self._last = ("", ())
            self._last = (rule.ours, rule.split(read_whole(self._source, rule.ours)))
        return box.of(self._last[1][index]).clone()


def check_shapes(source: Source, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `IlmCompileError` naming the first tensor that is missing, extra or misshapen."""
    got = {n: s.shape for n, s in source.specs().items() if not n.endswith(IGNORED_SUFFIX)}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise IlmCompileError(
                f"convert: {source.where}: {name}: expected {_shape(expected, name)}, got "
                f"{_shape(got, name)}; are MODEL and --from those of the input?"
            )


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"shape {shapes[name]}" if name in shapes else "no such tensor"
