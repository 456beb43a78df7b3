"""Old checkpoints lose their name at once, and then each rank deletes what it wrote."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path

import pytest

from ilm_compile.program.plan import Plan
from ilm_compile.runtime.checkpoint import storage
from ilm_compile.runtime.checkpoint.storage import LocalStorage
from tests.support.checkpoint_job import Job
from tests.support.world import World


def save_three(rank: int, folder: str, lame: int | None) -> list[str]:
    """The files that this rank deletes while three steps are saved and one stays.

    lame: a rank that deletes nothing, as one that is killed before.
    """
    gone: list[str] = []
    delete = storage._delete

    def noting(path: Path) -> None:
        if rank != lame:
            gone.append(path.name)
            delete(path)

    job = Job(folder, plan=Plan(tp=2), keep_last=1)
    job.manager.prepare()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_delete", noting)
        for step in (1, 2, 3):
            job.manager.save(step, wait=True)
        job.manager.close()
    return sorted(gone)


def own_files(rank: int) -> list[str]:
    manifest = ["manifest.json"] if rank == 0 else []
    return [*manifest, f"part-{rank:05d}.json", f"rank-{rank:05d}-000.safetensors"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_rank_deletes_its_own_files(world2: World, tmp_path: Path) -> None:
    gone = world2.run(save_three, str(tmp_path), None)
    assert gone == [sorted(own_files(rank) * 2) for rank in (0, 1)]
    assert names(tmp_path) == ["step-00000003"]


def clean(rank: int, folder: str) -> list[str]:
    gone: list[str] = []
    delete = storage._delete
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_delete", lambda path: (gone.append(path.name), delete(path)))
        Job(folder, plan=Plan(tp=2)).manager.prepare()
    return sorted(gone)


@pytest.mark.parametrize("lame", [0, 1])
def test_what_a_killed_rank_left_looks_unfinished_and_goes_at_the_next_start(
    world2: World, tmp_path: Path, lame: int
) -> None:
    world2.run(save_three, str(tmp_path), lame)
    complete, *left = names(tmp_path)[::-1]
    assert complete == "step-00000003"
    assert [name.partition("-")[2][8:13] for name in left] == [".tmp-", ".tmp-"]
    for name in left:
        assert names(tmp_path / name) == own_files(lame)
    gone = world2.run(clean, str(tmp_path))
    own = [[name for name in files if name != "probe"] for files in gone]
    assert own == [sorted(own_files(rank) * 2) if rank == lame else [] for rank in (0, 1)]
    assert names(tmp_path) == ["step-00000003"]


def test_a_folder_that_cannot_be_deleted_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    job = Job(tmp_path, keep_last=1)
    job.manager.save(1, wait=True)
    monkeypatch.setattr(storage, "_delete", refuse)
    with warnings.catch_warnings(record=True) as told:  # a thread tells it, now or later
        warnings.simplefilter("always")
        job.manager.save(2, wait=True)
        job.manager.close()
    (warning,) = map(str, (each.message for each in told))
    assert re.search("an old checkpoint cannot be deleted: .* not permitted", warning)
    assert names(tmp_path)[-1] == "step-00000002"
    assert len(names(tmp_path)) == 2


def test_half_of_a_replaced_checkpoint_does_not_come_back(tmp_path: Path) -> None:
    """Its deletion is cut off, and the one that replaced it is deleted later."""
    Job(tmp_path).manager.save(1, wait=True)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001.old-0123abcd")
    local = LocalStorage(tmp_path)
    (retired,) = local.replaced()
    local.delete_folder(retired, rank=1, size=2)
    local.retire("step-00000001")
    local.left_over()
    assert [name for name in names(tmp_path) if ".tmp-" not in name] == []
