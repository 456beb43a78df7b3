"""Layouts: what a rank of a mesh of several axes holds."""

from __future__ import annotations

import pytest
import torch

from ilm_compile.program.layout import INVARIANT, Layout, MeshAxis, Place
from ilm_compile.program.placement import P, R, S
from ilm_compile.program.program import Variable

SIZES = {"tp": 2, "cp": 3}
LAYOUTS = [
    INVARIANT,
    Layout.of({"tp": S(0)}),
    Layout.of({"tp": S(1), "cp": S(0)}),
    Layout.of({"tp": S(0), "cp": S(0)}),
    Layout.of({"tp": S(0, (4, 8)), "cp": R}),
    Layout.of({"tp": P, "cp": S(1, (3, 3))}),
]
PLACES = [Place(SIZES, {"tp": t, "cp": c}) for t in range(2) for c in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_text_and_back(layout):
    assert Layout.parse(str(layout)) == layout


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parts_have_the_local_shape_and_make_the_whole(layout):
    full = torch.arange(1.0, 73.0).view(12, 6)
    parts = [layout.cut(full, place) for place in PLACES]
    assert {tuple(part.shape) for part in parts} == {layout.local_shape(full.shape, SIZES)}
    assert layout.global_shape(parts[0].shape, SIZES) == full.shape
    seen = sum(layout.alone(part, place) for part, place in zip(parts, PLACES, strict=True))
    copies = len(PLACES) * parts[0].numel() / full.numel()
    assert torch.equal(seen, copies * full)


def test_a_later_axis_cuts_what_the_earlier_left():
    layout = Layout.of({"tp": S(0), "cp": S(0)})
    part = layout.cut(torch.arange(12), Place(SIZES, {"tp": 1, "cp": 2}))
    assert part.tolist() == [10, 11]


def test_an_axis_sees_the_axes_before_as_local():
    assert MeshAxis.of("cp", SIZES).sizes == {"cp": 3}
    assert MeshAxis.of("tp", SIZES).sizes == SIZES


@pytest.mark.parametrize(
    ("layout", "partial", "shard"),
    [(INVARIANT, False, False), (Layout.of({"cp": P}), True, False), (LAYOUTS[2], False, True)],
    ids=str,
)
def test_what_holds_on_some_axis(layout, partial, shard):
    assert (layout.is_partial, layout.is_shard) == (partial, shard)


def test_the_placement_of_a_variable_is_that_of_tensor_parallel():
    layout = Layout.of({"tp": S(0), "cp": R})
    variable = Variable("w", (4, 4), torch.float32, True, True, layout=layout)
    assert variable.placement == S(0)
