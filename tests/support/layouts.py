"""Layouts on one axis, as most tests speak of them."""

from __future__ import annotations

from torch import fx

from ilm_compile.program.layout import Layout, MeshAxis, Place, layout_of
from ilm_compile.program.placement import Placement


def axis(size: int, name: str = "tp") -> MeshAxis:
    """An axis of a mesh that has no other."""
    return MeshAxis.of(name, {name: size})


def tp(placement: Placement) -> Layout:
    """The layout that cuts over tp alone."""
    return Layout.of({"tp": placement})


def tp_place(rank: int, size: int) -> Place:
    """The place of a rank of `size` tp ranks."""
    return Place({"tp": size}, {"tp": rank})


def placed(node: fx.Node, name: str = "tp") -> Placement:
    """How a node's value lies on one axis."""
    return layout_of(node).on(name)
