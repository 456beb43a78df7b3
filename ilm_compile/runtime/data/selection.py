"""Which documents of the token files are used, and in which order they are packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.shard import TokenShard
from ilm_compile.runtime.data.shard_index import Int64

LONG_DOCUMENTS = ("refuse", "split", "truncate")


@dataclass(frozen=True, slots=True)
class Selection:
    """In the order of packing, (documents,) each: number of the shard, number in it, tokens."""

    shards: Int64
    documents: Int64
    lengths: Int64


def select(
    shards: Sequence[TokenShard],
    *,
    min_length: int,
    min_length_by_type: Mapping[str, int],
    max_length: int,
    long_documents: str,
    shuffle_seed: int | None,
) -> Selection:
    """Leave out the short documents, deal with the long ones, and draw the order.

    long_documents, of those with more than `max_length` tokens: "refuse" raises, "split" keeps
    their length (a row will cut them), "truncate" shortens them. Raises `IlmCompileError` if no
    document is left, or `min_length_by_type` names an unknown type.
    """
    _check_types(shards, min_length_by_type)
    numbers, documents, lengths = [], [], []
    for number, shard in enumerate(shards):
        least = max(1, min_length_by_type.get(shard.type_name, min_length))
        kept = np.flatnonzero(shard.lengths >= least)
        numbers.append(np.full(len(kept), number, np.int64))
        documents.append(kept.astype(np.int64))
        lengths.append(shard.lengths[kept])
        if long_documents == "refuse":
            _refuse_long(shard, max_length, kept)
    total = np.concatenate([np.zeros(0, np.int64), *lengths])
    if not len(total):
        raise IlmCompileError(
            f"token files: expected documents of the least length, {min_length} tokens "
            f"{dict(min_length_by_type) or ''}, found none in {len(shards)} files; lower min_length"
        )
    if long_documents == "truncate":
        total = np.minimum(total, max_length)
    order = np.arange(len(total))
    if shuffle_seed is not None:
        order = np.random.default_rng(shuffle_seed).permutation(len(total))
    return Selection(
        shards=np.concatenate(numbers)[order],
        documents=np.concatenate(documents)[order],
        lengths=total[order],
    )


def _check_types(shards: Sequence[TokenShard], named: Mapping[str, int]) -> None:
    types = {shard.type_name for shard in shards}
    unknown = sorted(set(named) - types)
    if unknown:
        raise IlmCompileError(
            f"token files: min_length_by_type is for {', '.join(unknown)}, expected only the types "
            f"found: {', '.join(sorted(types))}"
        )


def _refuse_long(shard: TokenShard, max_length: int, kept: Int64) -> None:
    long = kept[shard.lengths[kept] > max_length]
    if len(long):
        raise IlmCompileError(
            f"token files: {len(long)} documents of {shard.path} are longer than a row of "
            f"{max_length} tokens, the first is document {long[0]} with {shard.lengths[long[0]]}; "
            "use packing 'cut', or long_documents 'split' or 'truncate'"
        )
