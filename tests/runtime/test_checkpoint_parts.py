"""A checkpoint in parts: who reads which, what is written together, and those of one manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ilm_compile.program.plan import Plan
from ilm_compile.runtime.checkpoint import CheckpointError
from ilm_compile.runtime.checkpoint.parts import Finder, contents, near, part_name, runs
from ilm_compile.runtime.checkpoint.slices import read_manifest
from ilm_compile.runtime.checkpoint.storage import LocalStorage
from tests.support.checkpoint_job import Job, same
from tests.support.world import World

NAME = "step-00000001"


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([5], ((5, 5, 1),)),
        ([0, 1, 2, 3], ((0, 3, 1),)),
        ([0, 8, 16], ((0, 16, 8),)),
        ([0, 1, 4, 8, 12], ((0, 1, 1), (4, 12, 4))),
    ],
)
def test_ranks_are_written_as_few_runs(ranks: list[int], expected: Any) -> None:
    assert runs(ranks) == expected


@pytest.mark.parametrize("place", range(-1, 18))
@pytest.mark.parametrize("ranks", [[5], [0, 1, 2, 3], [0, 8, 16], [1, 2, 3, 6, 9, 12, 17]])
def test_ranks_come_outwards_from_the_reader(ranks: list[int], place: int) -> None:
    found = list(near(runs(ranks), place))
    assert sorted(found) == ranks
    below, above = ([r for r in found if (r <= place) is side] for side in (True, False))
    assert below == sorted(below, reverse=True)
    assert above == sorted(above)
    assert found[0] == max((r for r in ranks if r <= place), default=ranks[0])


# What is written


def save(folder: Path) -> Job:
    job = Job(folder)
    job.step()
    job.manager.save(1, wait=True)
    job.manager.close()
    return job


@pytest.mark.parametrize("change", ["twice", "not at all"])
def test_slices_that_do_not_make_up_a_tensor_are_not_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from ilm_compile.runtime.checkpoint import manager

    write = manager.write_part

    def wrongly(storage: Any, working: str, part: Any, pieces: Any, groups: Any) -> None:
        wrong = [*pieces, pieces[0]] if change == "twice" else pieces[1:]
        write(storage, working, part, wrong, groups)

    def counted(pieces: Any) -> int:
        return cover([*pieces, pieces[0]] if change == "twice" else pieces[1:])

    cover = manager.cover
    monkeypatch.setattr(manager, "write_part", wrongly)
    monkeypatch.setattr(manager, "cover", counted)
    with pytest.raises(CheckpointError, match=r"step 1 .*model/\w+: expected slices that cover"):
        Job(tmp_path).manager.save(1, wait=True)
    assert not list(tmp_path.iterdir())


def test_a_manifest_of_version_1_is_still_read(tmp_path: Path) -> None:
    """All of it was in one file."""
    job = save(tmp_path)
    storage = LocalStorage(tmp_path)
    manifest = read_manifest(storage, NAME)
    parts = list(contents(storage, NAME, manifest))
    manifest.save, manifest.tensors = "", {}
    for part in parts:
        manifest.files |= part.files
        manifest.tensors |= part.tensors
        (tmp_path / NAME / part_name(part.rank)).unlink()
    (tmp_path / NAME / "manifest.json").write_bytes(manifest.to_bytes())
    assert json.loads((tmp_path / NAME / "manifest.json").read_text())["body"]["version"] == 1
    expected = torch.get_rng_state()
    other = Job(tmp_path, seed=4)
    torch.manual_seed(9)
    assert other.manager.resume() == 1
    assert same(other.weights(), job.weights())
    assert other.counter.value == 1
    assert torch.equal(torch.get_rng_state(), expected)
    assert job.step() == other.step()


# What is read


def read_by(rank: int, folder: str, saved: dict[str, Any], own: dict[str, Any]) -> list[int]:
    """Save under one plan, load under another; the parts that this rank reads to fill tensors."""
    job = Job(folder, plan=Plan(**saved))
    job.step()
    job.manager.save(1, wait=True)
    other, read = Job(folder, plan=Plan(**own), seed=4), set()
    find = Finder._part

    def noting(finder: Finder, rank: int) -> Any:
        read.add(rank)
        return find(finder, rank)

    Finder._part = noting  # type: ignore[method-assign]
    try:
        other.manager.resume()
    finally:
        Finder._part = find  # type: ignore[method-assign]
    assert same(other.parallel.full_state_dict(), job.parallel.full_state_dict())
    return sorted(read)


PP, TP = {"pp": 2}, {"tp": 2}


@pytest.mark.parametrize(
    ("saved", "own", "expected"),
    [
        (PP, PP, [[0], [1]]),  # each has all of its stage
        (TP, TP, [[0], [0, 1]]),  # what tp does not cut is in the part of the first
        (TP, PP, [[0, 1], [0, 1]]),
    ],
    ids=["pp", "tp", "tp to pp"],
)
def test_a_rank_reads_the_parts_that_it_needs(
    world2: World, tmp_path: Path, saved: Any, own: Any, expected: list[list[int]]
) -> None:
    assert world2.run(read_by, str(tmp_path), saved, own) == expected
