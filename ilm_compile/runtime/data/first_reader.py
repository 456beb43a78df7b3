"""Which rank of a job reads the indexes of a token folder that has no summary, while others wait.

That is rank 0; on a node that does not see what rank 0 wrote, the first of its ranks. Nobody waits
for one that does not begin, or that goes on no more: then each rank reads for itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import Store, distributed_c10d  # type: ignore[attr-defined]

from ilm_compile.runtime.guard.activity import ACTIVITY

BEGIN_S = 10.0  # in which a rank that reads for others says so
_PACE_S = 5.0  # between two looks at how far it is


def leaders(rank: int) -> list[int]:
    """The ranks that may read for `rank`, in turn, itself perhaps among them."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    return list(dict.fromkeys((0, rank - local)))


@contextmanager
def reading_for_others(root: Path, rank: int) -> Iterator[Callable[[], object]]:
    """Read for others within: say so first, with what is yielded after each file, and at the end.

    Said whatever comes of it, so that after an error the others read, and meet it, themselves.
    """
    if (store := _store()) is None:
        yield lambda: None
        return
    key = _key(root, rank)
    store.set(f"{key}/begun", "")
    try:
        yield lambda: store.add(f"{key}/files", 1)
    finally:
        store.set(f"{key}/done", "")


def wait_for(root: Path, rank: int) -> bool:
    """Wait until `rank` has read for others; whether it has.

    False at once without a process group, after `BEGIN_S` if it does not begin, and after the
    group's timeout in which it has read no file.
    """
    if (store := _store()) is None:
        return False
    key = _key(root, rank)
    try:
        store.wait([f"{key}/begun"], timedelta(seconds=BEGIN_S))
        files, since = 0, time.monotonic()
        while not store.check([f"{key}/done"]):
            if (found := store.add(f"{key}/files", 0)) != files:
                files, since = found, time.monotonic()
                ACTIVITY.do(f"rank {rank} has read {files} indexes of {root}")
            elif time.monotonic() - since > store.timeout.total_seconds():  # type: ignore[attr-defined]
                return False
            _look(store, f"{key}/done")
    except dist.DistError:
        return False
    return True


def _look(store: Store, key: str) -> None:
    try:
        store.wait([key], timedelta(seconds=_PACE_S))
    except dist.DistStoreError:
        return


def _store() -> Store | None:
    return distributed_c10d._get_default_store() if dist.is_initialized() else None


def _key(root: Path, rank: int) -> str:
    return f"ilm_compile/indexes/{rank}/{root}"
