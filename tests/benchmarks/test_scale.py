"""What one rank does must not grow with the world, and it is noticed where it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks import scale
from ilm_compile.runtime.checkpoint.parts import Finder
from ilm_compile.runtime.data import BatchIterator, DummyDataset, Part
from ilm_compile.runtime.guard.report import Board

Rows = list[dict[str, Any]]


def count(folder: Path) -> Rows:
    worlds = [8, 32]
    for world in worlds:
        (folder / str(world)).mkdir()
    return [scale.measure(world, folder / str(world)) for world in worlds]


def test_the_counts_of_a_rank_stay(tmp_path: Path) -> None:
    rows = count(tmp_path)
    assert scale.growing(rows) == []
    own = scale.ROWS * scale.MICRO_BATCHES * scale.STEPS
    for row in rows:
        assert row["rows_read"] == own
        assert row["microbatch_iterations"] == scale.MICRO_BATCHES * scale.STEPS
        assert row["watched_files"] == 1
        assert row["other_token_files"] == 1  # the summary
        assert row["process_groups"] == 5  # all, pp, dp, tp, and one for axes of one rank
        assert row["checkpoint_files"] == 4  # the manifest, its share, its own part, that of tp 0


class Whole(BatchIterator):
    """Reads every row, and gives the part."""

    def __init__(self, data: DummyDataset, *, global_batch_size: int, part: Part) -> None:
        super().__init__(data, global_batch_size=global_batch_size)
        self._own = part.of(global_batch_size)

    def __next__(self) -> dict[str, Tensor]:
        return {n: v[self._own.start : self._own.stop] for n, v in super().__next__().items()}


def all_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scale, "BatchIterator", Whole)


def all_parts(patch: pytest.MonkeyPatch) -> None:
    find = Finder.slices

    def everywhere(self: Finder, tensor: str, record: Any) -> Any:
        for rank in range(self._manifest.world_size):
            self._part(rank)
        return find(self, tensor, record)

    patch.setattr(Finder, "slices", everywhere)


def all_files(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Board, "is_hung", lambda self: any(self.folder.glob("hang-*.json")))


def all_groups(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("ilm_compile.runtime.groups._equally_many", lambda device: False)


def all_indexes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("ilm_compile.runtime.data.shard_folder.read_summary", lambda folder: {})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (all_rows, "rows_read"),
        (all_parts, "manifest_bytes"),
        (all_files, "watched_files"),
        (all_groups, "process_groups"),
        (all_indexes, "other_token_files"),
    ],
)
def test_a_rank_that_takes_more_than_its_share_is_seen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], None],
    name: str,
) -> None:
    change(monkeypatch)
    assert name in scale.growing(count(tmp_path))
