"""Fixtures that several areas share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.garbage import collect_rarely
from tests.support.prepared import Prepared
from tests.support.world import World

# Files that take longest, the longest first: started last, one would keep a worker while the
# others have nothing left. What is not named keeps its place behind them.
LONGEST = (
    "tests/test_expert_parallel.py",
    "tests/test_context_parallel.py",
    "tests/test_zoo.py",
    "tests/test_resume.py",
    "tests/training/test_examples.py",
    "tests/test_faults.py",
    "tests/test_split_schedules.py",
    "tests/test_equality.py",
    "tests/test_compiled.py",
    "tests/runtime/test_low_weights.py",
    "tests/training/test_train.py",
    "tests/test_demo.py",
    "tests/proof/test_verify.py",
    "tests/test_traffic.py",
    "tests/proof/test_sizes.py",
    "tests/proof/test_translation.py",
    "tests/passes/test_check_pass.py",
    "tests/passes/test_cast_bf16.py",
    "tests/benchmarks/test_compare_plans.py",
    "tests/proof/test_wrong_programs.py",
    "tests/test_checkpoint_faults.py",
    "tests/proof/test_right_programs.py",
    "tests/test_failure.py",
    "tests/proof/test_emulate.py",
    "tests/proof/test_mutations.py",
    "tests/passes/test_fused_plans.py",
    "tests/config/test_fuzz.py",
    "tests/passes/test_parameters.py",
)
ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {ROOT / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish() -> None:
    collect_rarely()


@pytest.fixture(scope="session")
def prepared() -> Iterator[Prepared]:
    """A process that keeps what it traces, for all modules."""
    with Prepared() as prepared:
        yield prepared


@pytest.fixture(scope="module")
def world2() -> Iterator[World]:
    """Two gloo processes, kept for the tests of one module."""
    with World(2) as world:
        yield world


@pytest.fixture(scope="module")
def world4() -> Iterator[World]:
    """Four gloo processes, kept for the tests of one module."""
    with World(4) as world:
        yield world


@pytest.fixture
def world8() -> Iterator[World]:
    """Eight gloo processes, for one test."""
    with World(8) as world:
        yield world
