"""The processes that interpret and compile Triton kernels."""

from collections.abc import Iterator

import pytest

from tests.kernels.worker import Worker


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Worker]:
    """Runs launchers on CPU tensors: `interpreter.call("module:function", *args)`."""
    pytest.importorskip("triton")
    with Worker(TRITON_INTERPRET="1") as worker:
        yield worker


@pytest.fixture(scope="session")
def compiler() -> Iterator[Worker]:
    """Compiles kernels for GPUs that are not there, as `tests.kernels.aot` asks."""
    pytest.importorskip("triton")
    with Worker(TRITON_INTERPRET="0") as worker:
        yield worker
