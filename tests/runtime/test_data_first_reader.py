"""A folder without a summary is read by one rank of a job, which the others wait for."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from pathlib import Path

import pytest

from ilm_compile.runtime.data import first_reader, open_shards, shard, write_shard
from ilm_compile.runtime.data.shard_summary import NAME
from tests.support.world import World

FILES = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files without a summary, as other tools leave them, written a minute ago."""
    for number in range(FILES):
        write_shard(tmp_path / f"{number}.bin", [[1, 2, 3]] * (number + 1))
    for path in tmp_path.iterdir():
        os.utime(path, ns=(0, path.stat().st_mtime_ns - 60 * 10**9))
    return tmp_path


def opened(
    rank: int, folder: str, readers: int = 0, late: float = 0.0
) -> tuple[int, list[str] | str, list[str]]:
    """Bytes of indexes that this rank reads, what it finds or its error, and what it says.

    readers: that many ranks from 0 do not open the folder. late: seconds that rank 0 takes a file.
    """
    if rank < readers:
        return 0, [], []
    read, number = shard.read_index, 0

    def counted(path: Path, size: int) -> object:
        nonlocal number
        number += path.with_name(path.name + ".meta").stat().st_size
        time.sleep(late if rank == 0 else 0)
        return read(path, size)

    shard.read_index = counted  # type: ignore[assignment]
    began = first_reader.BEGIN_S
    first_reader.BEGIN_S = 0.2 if readers else began
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = [f"{s.path.name} {len(s)} {s.digest().hex()}" for s in open_shards(folder)]
        return number, found, [str(each.message) for each in told]
    except Exception as error:
        return number, str(error), []
    finally:
        shard.read_index = read
        first_reader.BEGIN_S = began


def all_indexes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.meta"))


def test_one_rank_of_four_reads_what_one_alone_reads(world4: World, folder: Path) -> None:
    alone, expected, _ = opened(0, str(folder))
    assert (alone, len(expected)) == (all_indexes(folder), FILES)
    results = world4.run(opened, str(folder), 0, 0.1)
    assert [number for number, _, _ in results] == [alone, 0, 0, 0]
    assert all(found == expected and not told for _, found, told in results)
    assert (folder / NAME).is_file()
    assert [number for number, _, _ in world4.run(opened, str(folder))] == [0] * 4


def test_a_folder_that_cannot_be_written_to_is_read_by_each_and_told_once(
    world4: World, folder: Path
) -> None:
    (folder / NAME).mkdir()
    results = world4.run(opened, str(folder))
    assert [number for number, _, _ in results] == [all_indexes(folder)] * 4
    assert len({tuple(found) for _, found, _ in results}) == 1
    (said,), *others = (told for _, _, told in results)
    assert "none can be written there, so each of the 4 ranks reads all their indexes" in said
    assert others == [[]] * 3


def test_nobody_waits_for_a_rank_that_does_not_come(world4: World, folder: Path) -> None:
    _, *results = world4.run(opened, str(folder), 1)
    assert [number for number, _, _ in results] == [all_indexes(folder)] * 3
    assert {len(found) for _, found, _ in results} == {FILES}


def of_node(rank: int, folders: list[str]) -> int:
    """Bytes that this rank reads, of two nodes of two ranks each of which has a folder."""
    began, first_reader.BEGIN_S = first_reader.BEGIN_S, 2.0
    os.environ["LOCAL_RANK"] = str(rank % 2)
    try:
        return opened(rank, folders[rank // 2])[0]
    finally:
        del os.environ["LOCAL_RANK"]
        first_reader.BEGIN_S = began


def test_on_a_node_that_does_not_see_what_rank_0_wrote_its_first_rank_reads(
    world4: World, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    for path in folder.iterdir():
        shutil.copy2(path, other)
    size = all_indexes(folder)
    assert world4.run(of_node, [str(folder), str(other)]) == [size, 0, size, 0]


def test_what_the_first_cannot_read_every_rank_names(world4: World, folder: Path) -> None:
    (folder / "3.bin.meta").write_bytes(b"no array")
    results = world4.run(opened, str(folder))
    assert all("3.bin.meta as a NumPy array" in found for _, found, _ in results)
