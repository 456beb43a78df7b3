"""Regions: blocks are found in every model, and each region is one run of nodes."""

from itertools import groupby

import pytest
import torch
from torch import Tensor, nn

from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from tests.program.samples import traced

BLOCKS = {
    "internlm": "blocks",
    "internlm2": "layers",
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "tied": "blocks",
}


def region_names(program: Program) -> list[str]:
    """The region of each call in order, a run of the same region as one."""
    return [
        program.regions[index].name
        for index, _ in groupby(node.meta["region"] for node in program.calls())
    ]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found(name: str) -> None:
    program = traced(name)
    blocks = [f"{BLOCKS[name]}.{i}" for i in range(2)]
    assert [r.name for r in program.regions] == ["prologue", *blocks, "epilogue"]
    assert [r.name for r in program.regions if r.is_block] == blocks
    assert not any(r.recompute for r in program.regions)


@pytest.mark.parametrize("name", BLOCKS)
def test_each_region_is_one_run_of_nodes(name: str) -> None:
    program = traced(name)
    assert region_names(program) == [r.name for r in program.regions]


class Layers(nn.Module):
    """Linear layers called in any order, with a function between two of them."""

    def __init__(self, layers: nn.Module, calls: list[str]) -> None:
        super().__init__()
        self.layers, self.calls = layers, calls

    def forward(self, x: Tensor) -> Tensor:
        for path in self.calls:
            x = self.layers.get_submodule(path)(x).tanh()
        return x.sum()


def linears(count: int) -> list[nn.Module]:
    return [nn.Linear(4, 4) for _ in range(count)]


def names_of(layers: nn.Module, calls: list[str]) -> list[str]:
    program = trace(Layers(layers, calls), example_inputs={"x": ((2, 4), torch.float32)})
    names = [region.name for region in program.regions]
    assert region_names(program) == [name for name in names if name != "prologue"]
    return names


def test_model_without_repeated_blocks_is_one_region() -> None:
    layers = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    assert names_of(layers, ["first", "second"]) == ["prologue", "epilogue"]


def test_items_of_a_sequential_are_blocks() -> None:
    names = names_of(nn.Sequential(*linears(3)), ["0", "1", "2"])
    assert names == ["prologue", "layers.0", "layers.1", "layers.2", "epilogue"]


def test_blocks_come_in_the_order_they_are_called_in() -> None:
    names = names_of(nn.ModuleList(linears(3)), ["2", "0", "1"])
    assert names == ["prologue", "layers.2", "layers.0", "layers.1", "epilogue"]


def test_block_that_is_never_called_is_no_region() -> None:
    names = names_of(nn.ModuleList(linears(3)), ["0", "2"])
    assert names == ["prologue", "layers.0", "layers.2", "epilogue"]


def test_block_that_comes_back_stays_with_the_one_it_follows() -> None:
    names = names_of(nn.ModuleList(linears(2)), ["0", "1", "0"])
    assert names == ["prologue", "layers.0", "layers.1", "epilogue"]


def test_the_container_with_most_calls_is_the_one_of_the_blocks() -> None:
    layers = nn.ModuleDict({"few": nn.ModuleList(linears(2)), "many": nn.ModuleList(linears(3))})
    names = names_of(layers, ["many.0", "many.1", "many.2", "few.0", "few.1"])
    assert names == ["prologue", *(f"layers.many.{i}" for i in range(3)), "epilogue"]


def test_lists_inside_a_block_divide_it_no_further() -> None:
    blocks = [nn.ModuleDict({"experts": nn.ModuleList(linears(2))}) for _ in range(2)]
    calls = [f"{block}.experts.{expert}" for block in range(2) for expert in range(2)]
    names = names_of(nn.ModuleList(blocks), calls)
    assert names == ["prologue", "layers.0", "layers.1", "epilogue"]
