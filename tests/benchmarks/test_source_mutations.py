"""The benchmark of source mutants: faults are planted in a copy, and a test that fails is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from benchmarks import source_mutations
from benchmarks.source_mutants import MUTANTS, SourceMutant, read_mutants
from benchmarks.source_mutations import ROOT, Copy, Fate

INPUTS = "tests/runtime/test_step_inputs.py"

SEEDS = next(m for m in MUTANTS if m.what == "one dropout for all micro-batches")
HARMLESS = replace(SEEDS, new="hash((seed, step, place, 0))", killers=(INPUTS,))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    with closing(Copy(tmp_path_factory.mktemp("package"))) as copy:
        yield copy


def test_a_fault_is_killed_by_a_test_that_is_named(package: Copy) -> None:
    fate = source_mutations.judge(package, SEEDS, set())
    assert fate.killed_by == f"{INPUTS}::test_dropout_seeds_never_come_twice"


def test_what_changes_nothing_survives_and_the_copy_is_whole_again(package: Copy) -> None:
    fate = source_mutations.judge(package, HARMLESS, set())
    assert fate.killed_by is None
    planted = package.folder / SEEDS.file
    assert planted.read_text() == (ROOT / SEEDS.file).read_text()


def test_a_test_that_does_not_end_is_a_failure(package: Copy) -> None:
    assert package.failing([INPUTS], timeout=0.01) == f"no end of {INPUTS} in 0.01 s"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}-{m.what}")
def test_every_fault_has_one_place_and_is_python(mutant: SourceMutant) -> None:
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.old) == 1
    compile(source.replace(mutant.old, mutant.new), mutant.file, "exec")
    assert all((ROOT / file).exists() for file in mutant.killers)


def test_a_line_that_belongs_to_no_mutant_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"norm\.py: expected a name .*, got 'becomes two, too"):
        read_mutants("@ norm.py: state\nbecomes two\n- 1\nbecomes two, too\n+ 2\n")


def test_there_are_many_faults_and_none_twice() -> None:
    places = {(m.file, m.old, m.new) for m in MUTANTS}
    assert len(places) == len(MUTANTS) >= 60


def test_a_place_that_is_gone_is_an_error(package: Copy) -> None:
    gone = replace(SEEDS, old="no such text")
    with pytest.raises(ValueError, match=r"batch\.py: expected 'no such text' once, found it 0"):
        source_mutations.judge(package, gone, set())


def test_survivors_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    source_mutations.show([Fate(SEEDS, "x", 1.0), Fate(HARMLESS, None, 1.0)])
    assert "2 source mutants of the runtime, 1 survive" in capsys.readouterr().out


def test_a_test_that_fails_anyway_kills_nothing(package: Copy) -> None:
    planted = "tests/runtime/test_planted.py"
    (package.folder / planted).write_text("def test_it() -> None:\n    assert False\n")
    with pytest.raises(RuntimeError, match=r"test_planted\.py::test_it without any fault"):
        source_mutations.judge(package, replace(SEEDS, killers=(planted,)), set())
