"""Ranks see the same data: rank 0 hashes it, the others compare what is known without reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Mesh
from ilm_compile.runtime.data import (
    BatchIterator,
    TokenDataset,
    TokenShard,
    first_reader,
    write_shard,
)
from tests.support.world import World


def state_of(rank: int, folders: list[str]) -> tuple[dict[str, Any] | str, int]:
    """The state of a rank's batches, or why there is none, and how many files it hashed."""
    hashed: list[TokenShard] = []
    digest = TokenShard.digest

    def counted(shard: TokenShard) -> bytes:
        hashed.append(shard)
        return digest(shard)

    first_reader.BEGIN_S = 0.2  # that a rank waits for one that has another folder
    data = TokenDataset.open(folders[rank], seq_len=4, vocab_size=100)
    batches = BatchIterator(data, global_batch_size=2)
    TokenShard.digest = counted  # type: ignore[method-assign]
    try:
        batches.agree(Mesh.create(Plan()))
        return batches.state_dict(), len(hashed)
    except IlmCompileError as error:
        return str(error), len(hashed)
    finally:
        TokenShard.digest = digest  # type: ignore[method-assign]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    for name, documents in {"one": [[1, 2, 3]], "other": [[1, 2], [3]]}.items():
        for file in ("a.bin", "b.bin"):
            (tmp_path / name).mkdir(exist_ok=True)
            write_shard(tmp_path / name / file, documents)
    return [tmp_path / "one", tmp_path / "other"]


def test_rank_0_alone_hashes_the_files(world2: World, folders: list[Path]) -> None:
    (first, hashed), (second, none) = world2.run(state_of, [str(folders[0])] * 2)
    assert (hashed, none) == (2, 0)
    data = TokenDataset.open(folders[0], seq_len=4, vocab_size=100)
    assert first == second == BatchIterator(data, global_batch_size=2).state_dict()


def test_another_folder_on_a_rank_is_refused(world2: World, folders: list[Path]) -> None:
    for said, hashed in world2.run(state_of, [str(folder) for folder in folders]):
        assert "expected the same token files on all ranks, ranks [1] have others" in said
        assert hashed == 0
