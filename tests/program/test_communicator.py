"""Which communicator stands behind the name of a mesh axis."""

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ilm_compile.errors import ProgramError
from ilm_compile.ops.products import leaving_weight
from ilm_compile.program.bound import bind, bind_axes
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.communicator import (
    ShapeCommunicator,
    communicator,
    communicators,
)
from ilm_compile.program.dropout import seeded_dropout
from ilm_compile.program.reductions import partial_mean
from ilm_compile.program.vocab import vocab_embedding
from ilm_compile.runtime.communicator import SingleCommunicator

two, four = ShapeCommunicator(2), ShapeCommunicator(4)


def test_axis_without_communicator_is_refused() -> None:
    message = r"mesh axis 'tp' has no communicator in this thread, known are \[\].*communicators\("
    with pytest.raises(ProgramError, match=message):
        redistribute(torch.ones(2), "P", "I", "tp")


def test_refusal_names_the_known_axes() -> None:
    with communicators(dp=two, pp=four), pytest.raises(ProgramError, match=r"\['dp', 'pp'\]"):
        communicator("tp")


def test_blocks_nest_and_restore() -> None:
    with communicators(tp=two):
        with communicators(tp=four):
            assert communicator("tp") is four
        assert communicator("tp") is two
    with pytest.raises(ProgramError):
        communicator("tp")


def test_block_restores_after_an_exception() -> None:
    with pytest.raises(RuntimeError), communicators(tp=two):
        raise RuntimeError
    with pytest.raises(ProgramError):
        communicator("tp")


def in_a_new_thread(axis: str) -> object:
    found: list[object] = []

    def look() -> None:
        try:
            found.append(communicator(axis))
        except ProgramError as error:
            found.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


def test_block_is_of_this_thread_only() -> None:
    with communicators(tp=two):
        assert isinstance(in_a_new_thread("tp"), ProgramError)


def test_a_name_is_known_in_every_thread_for_as_long_as_it_is_kept() -> None:
    bound = bind({"tp": two})["tp"]
    name = bound.name
    with communicators(tp=four):
        assert communicator(name) is bound
        assert in_a_new_thread(name) is bound
    del bound
    with pytest.raises(ProgramError, match=re.escape(f"{name!r} has no communicator")):
        communicator(name)


def test_names_say_the_rank_and_are_given_once() -> None:
    first, second = (bind({"tp": two})["tp"].name for _ in range(2))
    assert first.startswith("tp[0/2].")
    assert first != second


def calling(target: Callable[..., Tensor], *args: Any, **kwargs: Any) -> fx.GraphModule:
    graph, root = fx.Graph(), nn.Module()
    given: list[Any] = [graph.placeholder("x"), *args]
    for place, each in enumerate(given):
        if isinstance(each, Tensor):
            root.register_buffer(f"arg{place}", each)
            given[place] = graph.get_attr(f"arg{place}")
    graph.output(graph.call_function(target, tuple(given), kwargs))
    return fx.GraphModule(root, graph)


CALLS = {
    "by position": (partial_mean, ([0], False, "tp"), {}),
    "by name": (redistribute, (), {"src": "P", "dst": "R", "axis": "tp"}),
    "inside an op": (
        torch.ops.ilm.query_dot_product_attention.default,
        (torch.ones(4, 2), torch.ones(4, 2), None, True, None, False, "S(1)", 1, "tp"),
        {},
    ),
    "left to a W": (leaving_weight(vocab_embedding), (torch.tensor([1, 2]), -1, "tp"), {}),
    "several": (seeded_dropout, (torch.tensor(3), 0.5, 0, "tp: S(0)"), {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_bound_graph_reaches_its_own_ranks_whatever_the_thread_has(call: str) -> None:
    target, args, kwargs = CALLS[call]
    graph_module = calling(target, *args, **kwargs)
    x = torch.arange(1.0, 3.0).view(1, 2)
    with communicators(tp=SingleRank(4, 1)):
        expected = graph_module(x)
    bound = bind({"tp": SingleRank(2, 0)})
    bind_axes(graph_module, bound)
    bound = bind({"tp": SingleRank(4, 1)})  # bound once more, to others
    bind_axes(graph_module, bound)
    graph_module.recompile()
    with communicators(tp=four):
        assert torch.equal(graph_module(x), expected)


class SingleRank(SingleCommunicator):
    """Says of itself that it is one of several."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.size, self.rank = size, rank


@pytest.mark.parametrize(
    ("method", "shape", "expected"),
    [
        ("all_reduce", (4, 3), (4, 3)),
        ("all_gather", (4, 3), (2, 4, 3)),
        ("reduce_scatter", (2, 4, 3), (4, 3)),
        ("all_to_all", (2, 4, 3), (2, 4, 3)),
        ("exchange", (5, 3), (5, 3)),
    ],
)
def test_shapes_of_ranks_that_do_not_exist(
    method: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    counts = ([2, 3], [4, 1]) if method == "exchange" else ()
    result = getattr(two, method)(torch.empty(shape, device="meta"), *counts)
    assert tuple(result.shape) == expected
