"""Document boundaries as the attention op and its backends need them.

cu_seqlens, what a user has, is integers, either (B, n): where the documents of each row of S tokens
start, beginning at 0 and padded with S, or (n,): the same over the flattened B*S tokens, padded
with B*S.

Boundaries, what attention computes with, are made of it once for all layers: (runs, sides, rows,
n + 1) int32. For each run of queries, side 0 is of the queries and side -1, where there is another,
of the keys up to the run's end: among all tokens of that side, row behind row, where each document
of a row starts and where the row ends. rows: B, or 1 where documents run over all B*S tokens, which
then are one row (`fold`). Padding makes documents of no tokens, which the kernels take: to drop
them would be to wait for the device.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError

torch.library.define(
    "ilm::document_boundaries",
    "(Tensor cu_seqlens, int batch, int num_tokens, int[]? tokens=None, bool on_host=False)"
    " -> Tensor",
)


def document_starts(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Index of the first token of the document that each token belongs to.

    cu_seqlens: (rows, n) integers, each row beginning at 0. Returns (rows, num_tokens) int64.
    """
    bounds = cu_seqlens.to(torch.int64).contiguous()
    tokens = torch.arange(num_tokens, device=bounds.device)
    tokens = tokens.expand(bounds.shape[0], num_tokens).contiguous()
    document = torch.searchsorted(bounds, tokens, right=True) - 1
    return bounds.gather(1, document)


def is_flat(cu_seqlens: Tensor | None) -> bool:
    """Whether documents run over the tokens of all rows; takes boundaries too."""
    if cu_seqlens is None:
        return False
    return cu_seqlens.dim() == 1 or (cu_seqlens.dim() == 4 and cu_seqlens.shape[2] == 1)


def fold(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Batch rows laid end to end where documents run over all B*S tokens: (1, B*S, ...)."""
    return x.reshape(1, -1, *x.shape[2:]) if is_flat(cu_seqlens) and len(x) != 1 else x


def runs_of(tokens: Sequence[int] | None, num_tokens: int, rows: int = 1) -> list[tuple[int, int]]:
    """Start and stop of each run of queries in `rows` rows that are one; None: all of them."""
    if tokens is None:
        return [(0, rows * num_tokens)]
    bounds = list(zip(tokens[::2], tokens[1::2], strict=True))
    offsets = range(0, rows * num_tokens, num_tokens)
    return [(row + start, row + stop) for row in offsets for start, stop in bounds]


def boundaries(
    cu_seqlens: Tensor | None,
    batch: int,
    num_tokens: int,
    tokens: Sequence[int] | None,
    device: torch.device,
) -> Tensor:
    """The boundaries, on `device`; boundaries are returned as they are. See above.

    cu_seqlens: None: each row is one document. tokens: as `ilm_compile.kernels.attention` has it.
    """
    if cu_seqlens is not None and cu_seqlens.dim() == 4:
        return cu_seqlens
    folded = batch if is_flat(cu_seqlens) else 1
    rows, length = batch // folded, folded * num_tokens
    start_of_row = torch.arange(rows + 1, device=device, dtype=torch.int32).unsqueeze(1)
    if cu_seqlens is None:
        starts = start_of_row[:-1] * 0
    else:
        starts = cu_seqlens.to(device=device, dtype=torch.int32).reshape(rows, -1)

    def side(start: int, stop: int) -> Tensor:
        first, width = start_of_row * (stop - start), stop - start
        inside = starts if width == length else starts.clamp(start, stop) - start
        return torch.cat((inside + first[:-1], first[1:]), 1)

    if tokens is None:
        return side(0, length)[None, None]
    sides = [side(*run) for a, b in runs_of(tokens, num_tokens, folded) for run in ((a, b), (0, b))]
    return torch.stack(sides).reshape(len(sides) // 2, 2, rows, -1)


def check_documents(cu_seqlens: Tensor, batch: int, num_tokens: int) -> None:
    """Raise IlmCompileError for documents that do not begin at 0, fall, or pass the last token."""
    rows = 1 if cu_seqlens.dim() == 1 else batch
    num_tokens = batch * num_tokens // rows
    for row, bounds in enumerate(cu_seqlens.reshape(rows, -1).tolist()):
        if bounds[0] != 0 or sorted(bounds) != bounds or bounds[-1] > num_tokens:
            raise IlmCompileError(
                f"ilm::attention: expected cu_seqlens that begin at 0, do not fall and end at most "
                f"at {num_tokens}; got {bounds} in row {row}"
            )


def document_ids(side: Tensor, num_tokens: int) -> Tensor:
    """Of each token of a side a number, the same for all of a document: (rows, num_tokens)."""
    rows = len(side)
    tokens = torch.arange(rows * num_tokens, device=side.device, dtype=side.dtype)
    return torch.searchsorted(side.flatten(), tokens, right=True).view(rows, num_tokens)


def queries(
    k: Tensor, cu_seqlens: Tensor | None, tokens: Sequence[int] | None
) -> Iterator[tuple[slice, slice, slice]]:
    """Of each document, and each run of queries that reaches into it: rows, queries, keys.

    The slices are of q and k as `fold` lays them; the queries are the last of the keys' tokens.
    """
    batch, num_tokens = k.shape[:2]
    runs, here = runs_of(tokens, num_tokens, batch if is_flat(cu_seqlens) else 1), 0
    if cu_seqlens is None:
        for start, stop in runs:
            yield slice(None), slice(here, here + stop - start), slice(0, stop)
            here += stop - start
        return
    if cu_seqlens.dim() != 4:
        check_documents(cu_seqlens, batch, num_tokens)
    found = boundaries(cu_seqlens, batch, num_tokens, tokens, cu_seqlens.device).tolist()
    for (start, stop), sides in zip(runs, found, strict=True):
        for row, (asked, seen) in enumerate(zip(sides[0], sides[-1], strict=True)):
            at = here - row * (stop - start)
            for (a, b), (c, d) in zip(pairwise(asked), pairwise(seen), strict=True):
                if a < b:
                    keys = slice(c - row * stop, d - row * stop)
                    yield slice(row, row + 1), slice(a + at, b + at), keys
        here += stop - start


def documents(
    batch: int, num_tokens: int, cu_seqlens: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Rows and tokens of each document, as `fold` lays them; all rows where each is one document.

    Raises IlmCompileError as `check_documents` does.
    """
    if cu_seqlens is None:
        yield slice(None), slice(0, num_tokens)
        return
    if cu_seqlens.dim() != 4:
        check_documents(cu_seqlens, batch, num_tokens)
    found = boundaries(cu_seqlens, batch, num_tokens, None, cu_seqlens.device)[0, 0].tolist()
    for row, bounds in enumerate(found):
        first = bounds[0]
        for start, stop in pairwise(bounds):
            if start < stop:
                yield slice(row, row + 1), slice(start - first, stop - first)


def _made(
    cu_seqlens: Tensor,
    batch: int,
    num_tokens: int,
    tokens: list[int] | None = None,
    on_host: bool = False,
) -> Tensor:
    host = torch.device("cpu")
    if cu_seqlens.device == host:
        check_documents(cu_seqlens, batch, num_tokens)
    device = host if on_host else cu_seqlens.device
    return boundaries(cu_seqlens, batch, num_tokens, tokens, device)


def _made_fake(
    cu_seqlens: Tensor,
    batch: int,
    num_tokens: int,
    tokens: list[int] | None = None,
    on_host: bool = False,
) -> Tensor:
    flat, count = cu_seqlens.dim() == 1, cu_seqlens.shape[-1] + 1
    rows, sides = 1 if flat else batch, 1 if tokens is None else 2
    runs = 1 if tokens is None else len(tokens) // 2 * (batch if flat else 1)
    device = "cpu" if on_host and not cu_seqlens.is_meta else cu_seqlens.device
    return cu_seqlens.new_empty((runs, sides, rows, count), dtype=torch.int32, device=device)


torch.library.impl("ilm::document_boundaries", ("cpu", "cuda"), _made)
torch.library.register_fake("ilm::document_boundaries", _made_fake)
