"""Which communicator stands behind the name of a mesh axis."""

import threading

import pytest
import torch

from ilm_compile.errors import ProgramError
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.communicator import (
    ShapeCommunicator,
    communicator,
    communicators,
    set_communicators,
)

two, four = ShapeCommunicator(2), ShapeCommunicator(4)


@pytest.fixture(autouse=True)
def forget_communicators() -> None:
    """A model that an earlier test parallelised has set some for the process."""
    set_communicators({})


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


def test_process_communicators_are_seen_by_every_thread() -> None:
    set_communicators({"tp": two})
    try:
        assert communicator("tp") is two
        assert in_a_new_thread("tp") is two
        with communicators(tp=four):
            assert communicator("tp") is four
    finally:
        set_communicators({})


def test_setting_again_replaces_all_axes() -> None:
    set_communicators({"tp": two})
    set_communicators({"dp": two})
    try:
        with pytest.raises(ProgramError, match=r"known are \['dp'\]"):
            communicator("tp")
    finally:
        set_communicators({})


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
