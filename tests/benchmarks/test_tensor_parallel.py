"""Tensor parallelism beside torch's: the same work, and what is made of the times."""

from dataclasses import replace

import pytest

from benchmarks.tensor_parallel import Sample, Samples, run_rank, show, summarize
from benchmarks.tensor_parallel_contest import CONTESTANTS, Size
from ilm_compile.errors import IlmCompileError
from tests.support.world import World

SIZE = Size(hidden=64, layers=2, seq=16, repeats=2)


def run(rank: int) -> Samples:
    return run_rank([SIZE])[0]


def samples(ours: list[float], theirs: list[float]) -> Samples:
    return {
        "ours": Sample(wall=ours, cpu=[1.0, 2.0], loss=2.0, grad_norm=3.0),
        "dtensor": Sample(wall=theirs, cpu=[2.0, 4.0], loss=2.0, grad_norm=3.0),
    }


def test_all_contestants_do_the_same_work(world2: World) -> None:
    figures = summarize(SIZE, world2.run(run))
    assert [figure["contestant"] for figure in figures] == list(CONTESTANTS)
    for figure in figures:
        assert figure["median_s"] >= figure["fastest_s"] > 0
        for what in ("loss", "grad_norm"):
            assert figure[what] == pytest.approx(figures[0][what], rel=1e-5)


def test_a_step_takes_as_long_as_its_slower_rank() -> None:
    ranks = [samples([1.0, 2.0, 4.0], [3.0, 2.0, 8.0]), samples([2.0, 1.0, 4.0], [1.0, 1.0, 1.0])]
    ours, theirs = summarize(SIZE, ranks)
    assert (ours["median_s"], ours["fastest_s"], ours["ratio_to_ours"]) == (2.0, 2.0, 1.0)
    assert (theirs["median_s"], theirs["fastest_s"]) == (3.0, 2.0)
    assert theirs["ratio_to_ours"] == 1.5  # of 3/2, 2/2 and 8/4
    assert theirs["processor_ratio"] == 2.0


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_other_work_is_refused(what: str) -> None:
    found = samples([1.0], [1.0])
    found["dtensor"] = replace(found["dtensor"], **{what: 3.1})
    with pytest.raises(IlmCompileError, match=rf"expected the {what} .* from dtensor"):
        summarize(SIZE, [found])


def test_the_table_shows_every_contestant(capsys: pytest.CaptureFixture[str]) -> None:
    show(summarize(SIZE, [samples([1.0], [1.5])]))
    printed = capsys.readouterr().out
    assert "hidden 64, 2 layers" in printed
    assert "dtensor" in printed
    assert "1.50" in printed
