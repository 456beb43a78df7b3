"""How the processes of one attempt at a job find each other, and none of the attempt before.

torchrun keeps its store when it starts the ranks again, so the addresses of dead processes are
still in it; and its count of restarts is each node's own, so nodes would not agree on it.
Therefore rank 0 invents a name for the attempt and tells it to each process that asks, and the
group is made of what is below that name. The same meeting knows who has not come.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ilm_compile.errors import PlanError

LOGGER = logging.getLogger("ilm_compile.guard")
NOTICE_S = 30.0
_ROOT = "ilm_compile"
_PACE_S = 0.02
_SHOWN = 8  # ranks in a message
_met: set[str] = set()  # names of attempts that this process has taken part in


def meet(timeout: timedelta) -> Store:
    """Return a store for the process group of exactly these processes, when all have come.

    Every rank calls it, with torchrun's variables set. Who is missing is told after 30 seconds.
    Raises `PlanError` naming the ranks that did not come within `timeout`, or what is wrong with
    the place to meet at.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    meeting = _Meeting(_open_store(rank, timeout), rank, size, timeout.total_seconds())
    name = meeting.lead() if rank == 0 else meeting.follow()
    _met.add(name)
    return PrefixStore(f"{_ROOT}/{name}", meeting.store)


def warn_of_restarts() -> None:
    """Say on rank 0 if the process group that somebody has made will not survive a restart."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and _has_agent_store() and not _met and dist.get_rank() == 0:
        LOGGER.warning(
            "start: torchrun may restart this job (--max-restarts=%d), but the process group was "
            "made by init_process_group over the store that torchrun keeps, where new ranks find "
            "the addresses of dead ones and wait for them; leave the call to parallelize, or give "
            "it store=ilm_compile.runtime.meeting.meet(timeout), rank and world_size",
            restarts,
        )


@dataclass
class _Meeting:
    """Every process asks under a token of its own, which no dead one can have left."""

    store: Store
    rank: int
    size: int
    timeout_s: float
    began: float = field(default_factory=time.monotonic)
    told: bool = False

    def lead(self) -> str:
        """Rank 0: answer whoever asks for a rank, the newest of them, until all ranks know."""
        name = os.urandom(8).hex()
        answered: dict[int, bytes] = {}
        missing = list(range(1, self.size))
        while missing := [rank for rank in missing if not self._has(f"{name}/came/{rank}")]:
            for rank in missing:
                asks = f"asks/{rank}"
                if self._has(asks) and (token := self._get(asks)) != answered.get(rank):
                    self._set(f"answer/{token.decode()}", name)
                    answered[rank] = token
            self._check_time(missing.copy)
            time.sleep(_PACE_S)
        self._set(f"{name}/all")
        return name

    def follow(self) -> str:
        """Another rank: ask, say that it knows, and wait for the others."""
        token = os.urandom(8).hex()
        self._set(f"asks/{self.rank}", token)
        self._wait(f"answer/{token}", lambda: [0])
        name = self._get(f"answer/{token}").decode()
        self._set(f"{name}/came/{self.rank}")
        others = [rank for rank in range(1, self.size) if rank != self.rank]
        self._wait(
            f"{name}/all",
            # Rank 0 alone is missing if it went away after it had answered.
            lambda: [r for r in others if not self._has(f"{name}/came/{r}")] or [0],
        )
        return name

    @property
    def _limit(self) -> float:
        """Seconds after which there is something to say."""
        return self.timeout_s if self.told else min(NOTICE_S, self.timeout_s)

    def _wait(self, key: str, missing: Callable[[], list[int]]) -> None:
        """Sleep in the store, which a thousand ranks may do where they may not poll."""
        while True:
            left = max(self.began + self._limit - time.monotonic(), _PACE_S)
            try:
                self.store.wait([f"{_ROOT}/{key}"], timedelta(seconds=left))
                return
            except dist.DistStoreError:
                self._check_time(missing)

    def _check_time(self, missing: Callable[[], list[int]]) -> None:
        """Say who is missing, and after the timeout raise."""
        waited = time.monotonic() - self.began
        if waited < self._limit:
            return
        ranks = missing()
        names = ", ".join(str(rank) for rank in ranks[:_SHOWN])
        more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
        who = f"rank{'s'[: len(ranks) > 1]} {names}{more} of {self.size}"
        if waited < self.timeout_s:
            self.told = True
            LOGGER.warning("start: rank %d waits for %s, %.0f s so far", self.rank, who, waited)
            return
        raise PlanError(
            f"start: {who} did not come within {self.timeout_s:g} s; see what its log says last, "
            f"and start {self.size} processes in all, on every node with the same MASTER_ADDR and "
            "MASTER_PORT"
        )

    def _has(self, key: str) -> bool:
        return bool(self.store.check([f"{_ROOT}/{key}"]))

    def _get(self, key: str) -> bytes:
        return bytes(self.store.get(f"{_ROOT}/{key}"))

    def _set(self, key: str, value: str = "") -> None:
        self.store.set(f"{_ROOT}/{key}", value)


def _open_store(rank: int, timeout: timedelta) -> Store:
    """torchrun's own store, or one that rank 0 serves where nothing else does."""
    host, port = _text("MASTER_ADDR"), _number("MASTER_PORT")
    _check_host(host)
    serves = rank == 0 and not _has_agent_store()
    try:
        return TCPStore(
            host, port, is_master=serves, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        what = "cannot be served by rank 0" if serves else "does not answer"
        raise PlanError(
            f"start: MASTER_ADDR={host} MASTER_PORT={port} {what}; give a free port of rank 0's "
            f"node, the same to every process, and see whether rank 0 runs "
            f"({str(error).splitlines()[0]})"
        ) from error


def _has_agent_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _check_host(host: str) -> None:
    """Raise before torch's own lookup, which tries for minutes and fails with frames of C++."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise PlanError(
            f"start: MASTER_ADDR={host} is no host that {socket.gethostname()} knows "
            f"({error.strerror}); give the name or address of rank 0's node as this node knows it"
        ) from error


def _text(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise PlanError(
            f"start: WORLD_SIZE is set but {name} is not; start the job with torchrun"
        ) from None


def _number(name: str) -> int:
    text = _text(name)
    if not text.isdecimal():
        raise PlanError(f"start: expected a number in the variable {name}, got {text!r}")
    return int(text)
