"""Whether all ranks were given the same: facts by name, compared as hashes before anything runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist


def differences(facts: Mapping[str, bytes], device: torch.device) -> list[str]:
    """Return a text for each group of ranks that differ from rank 0 in the same facts.

    Collective over the default process group, whose tensors lie on `device`; the names of the facts
    are the same on all ranks. Every rank gets the same texts.
    """
    own = torch.tensor([_number(value) for value in facts.values()], device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    table = torch.stack(everyone).cpu()
    ranks_by_names: dict[tuple[str, ...], list[int]] = {}
    for rank, differs in enumerate((table != table[0]).tolist()):
        names = tuple(name for name, is_other in zip(facts, differs, strict=True) if is_other)
        if names:
            ranks_by_names.setdefault(names, []).append(rank)
    return [
        f"ranks {ranks} differ from rank 0 in {', '.join(names)}"
        for names, ranks in ranks_by_names.items()
    ]


def _number(data: bytes) -> int:
    """The first 63 bits of a hash: a tensor holds them exactly."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8]) >> 1
