"""Groups of parameters that passes have made of others."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ilm_compile.program.parameter_map import ParameterMap
from ilm_compile.program.program import Variable
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.mapped import check_moves, mapped_groups


def variable(name: str, *shape: int) -> Variable:
    return Variable(name, shape, torch.float64, True, True)


def merge(first: str, second: str, into: str, rows: int) -> ParameterMap:
    return ParameterMap(
        "merge",
        (variable(first, rows, 2), variable(second, rows, 2)),
        (into,),
        lambda full: {into: torch.cat([full[first], full[second]])},
        lambda full: dict(zip((first, second), full[into].split(rows), strict=True)),
    )


def scale(name: str, factor: float) -> ParameterMap:
    return ParameterMap(
        "scale",
        (variable(name, 3),),
        (name,),
        lambda full: {name: full[name] * factor},
        lambda full: {name: full[name] / factor},
    )


def groups_of(*maps: ParameterMap) -> Any:
    return mapped_groups(SimpleNamespace(parameter_maps=maps))  # type: ignore[arg-type]


def test_maps_that_build_on_each_other_are_one_group() -> None:
    (chain, other) = groups_of(
        merge("a", "b", "ab", 1), merge("x", "y", "xy", 1), merge("ab", "c", "abc", 2)
    )
    other, chain = sorted((chain, other), key=lambda group: len(group.maps))
    assert [v.name for v in chain.model] == ["a", "b", "c"]
    assert chain.program == ("abc",)
    assert [v.name for v in other.model] == ["x", "y"]
    full: dict[str, Tensor] = {n: torch.rand(rows, 2) for n, rows in (("a", 1), ("b", 1), ("c", 2))}
    there = chain.to_program(full)
    assert torch.equal(there["abc"], torch.cat(list(full.values())))
    back = chain.to_model(there)
    assert all(torch.equal(back[name], full[name]) for name in full)


def test_a_map_that_computes_is_no_place_for_the_optimizers_state() -> None:
    check_moves(groups_of(merge("a", "b", "ab", 1)))
    with pytest.raises(CheckpointError, match=r"pass scale computes with the elements of \['a'\]"):
        check_moves(groups_of(scale("a", 2.0)))
