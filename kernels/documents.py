"""Document boundaries, `cu_seqlens`, as the attention op and its backends need them.

cu_seqlens is integers, either (B, n): where the documents of each row of S tokens start, beginning
at 0 and padded with S, or (n,): the same over the flattened B*S tokens, padded with B*S.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError


def document_starts(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Index of the first token of the document that each token belongs to.

    cu_seqlens: (rows, n) integers, each row beginning at 0. Returns (rows, num_tokens) int64.
    """
    bounds = cu_seqlens.to(torch.int64).contiguous()
    tokens = torch.arange(num_tokens, device=bounds.device)
    tokens = tokens.expand(bounds.shape[0], num_tokens).contiguous()
    document = torch.searchsorted(bounds, tokens, right=True) - 1
    return bounds.gather(1, document)


def fold(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Batch rows laid end to end when the boundaries run over all B*S tokens: (1, B*S, ...)."""
    flattened = cu_seqlens is not None and cu_seqlens.dim() == 1
    return x.reshape(1, -1, *x.shape[2:]) if flattened else x


def flat_boundaries(
    cu_seqlens: Tensor | None, batch: int, seq: int, device: torch.device, first: int = 0
) -> Tensor:
    """Boundaries over the flattened batch * seq tokens, int32, ending there; on the device.

    first: of the tokens from there on in each row only, with documents in rows of their own.

    Padding makes documents of no tokens, which the kernels take: to drop them would be to wait for
    the device.
    """
    width = seq - first
    starts = torch.arange(batch, device=device, dtype=torch.int32) * width
    if cu_seqlens is None:
        bounds = starts
    elif cu_seqlens.dim() == 1:
        bounds = cu_seqlens.to(torch.int32)
    else:
        inside = cu_seqlens.to(torch.int32).clamp(first, seq) - first
        bounds = (inside + starts.unsqueeze(1)).flatten()
    return torch.cat((bounds, bounds.new_full((1,), batch * width)))


def runs_of(tokens: Sequence[int] | None, num_tokens: int) -> list[tuple[int, int]]:
    """Start and stop of each run of queries; None: all of a row's."""
    bounds = [0, num_tokens] if tokens is None else tokens
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def queries(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, tokens: Sequence[int] | None
) -> Iterator[tuple[slice, slice, slice]]:
    """Of each document, and each run of queries that reaches into it: rows, queries, keys.

    The slices are of ``fold(q)`` and ``fold(k)``; the queries are the last of the keys' tokens.
    """
    batch, num_tokens = k.shape[:2]
    flattened = cu_seqlens is not None and cu_seqlens.dim() == 1
    runs, here = [], 0
    for row in range(batch if flattened else 1):
        for start, stop in runs_of(tokens, num_tokens):
            runs.append((row * num_tokens + start, row * num_tokens + stop, here))
            here += stop - start
    for rows, document in documents(batch, num_tokens, cu_seqlens):
        for start, stop, first in runs:
            begin, end = max(start, document.start), min(stop, document.stop)
            if begin < end:
                asked = slice(first + begin - start, first + end - start)
                yield rows, asked, slice(document.start, end)


def documents(
    batch: int, num_tokens: int, cu_seqlens: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Rows and tokens of each document, as `fold` lays them; all rows where each is one document.

    Raises IlmCompileError for boundaries that do not begin at 0, fall, or pass the last token.
    """
    if cu_seqlens is None:
        yield slice(None), slice(0, num_tokens)
        return
    rows = 1 if cu_seqlens.dim() == 1 else batch
    num_tokens = batch * num_tokens // rows
    for row, bounds in enumerate(cu_seqlens.reshape(rows, -1).tolist()):
        if bounds[0] != 0 or sorted(bounds) != bounds or bounds[-1] > num_tokens:
            raise IlmCompileError(
                f"ilm::attention: expected cu_seqlens that begin at 0, do not fall and end at most "
                f"at {num_tokens}; got {bounds} in row {row}"
            )
        for start, stop in zip(bounds, [*bounds[1:], num_tokens], strict=True):
            if start < stop:
                yield slice(row, row + 1), slice(start, stop)
