"""Documents of many token files, with a bound on what is open and on what is kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ilm_compile.runtime.data.shard import TokenShard
from ilm_compile.runtime.data.shard_index import Int64

CACHED_DOCUMENTS = 16  # the rows of a long document follow each other in validation
OPEN_FILES = 64  # a process may have 1024 on many systems


class DocumentReader:
    """Reads documents of `shards`; the files used least recently are unmapped."""

    def __init__(self, shards: Sequence[TokenShard], *, vocab_size: int) -> None:
        self._shards = shards
        self._vocab_size = vocab_size
        self._cache: OrderedDict[tuple[int, int], Int64] = OrderedDict()
        self._open: OrderedDict[int, TokenShard] = OrderedDict()

    def tokens(self, shard: int, document: int) -> Int64:
        """The tokens of a document by the number of its shard and its number in there.

        Raises what `TokenShard.tokens` raises.
        """
        place = (shard, document)
        if place in self._cache:
            self._cache.move_to_end(place)
            return self._cache[place]
        tokens = self._shards[shard].tokens(document, vocab_size=self._vocab_size)
        self._open[shard] = self._shards[shard]
        self._open.move_to_end(shard)
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        self._cache[place] = tokens
        if len(self._cache) > CACHED_DOCUMENTS:
            self._cache.popitem(last=False)
        return tokens

    def close(self) -> None:
        """Unmap every file; reading maps them again."""
        for shard in self._open.values():
            shard.close()
        self._open.clear()
