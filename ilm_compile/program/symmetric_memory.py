"""torch's products over symmetric memory, which ranks of one node read from each other.

The ops are not public: this is the only file that names them, and a test compares their schemas
with those below.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from ilm_compile.program.communicator import Communicator

# Of torch 2.11 to 2.13. B is (K, N), and A may have any dimensions before K.
SCHEMAS = {
    "fused_all_gather_matmul": "symm_mem::fused_all_gather_matmul(Tensor A, Tensor[] Bs, "
    "int gather_dim, str group_name, *, bool return_A=True) -> (Tensor?, Tensor[])",
    "fused_matmul_reduce_scatter": "symm_mem::fused_matmul_reduce_scatter(Tensor A, Tensor B, "
    "str reduce_op, int scatter_dim, str group_name) -> Tensor",
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class NearRanks(Protocol):
    """Ranks that may read each other's memory."""

    def symmetric_group(self, x: Tensor) -> str:
        """The name of their process group, "" where what is like `x` cannot be shared."""
        ...

    def count_pieces(self, piece: Tensor) -> None:
        """Count the pieces of all other ranks, each like `piece`, as sent."""
        ...


def near_ranks(comm: Communicator, x: Tensor) -> NearRanks | None:
    """The ranks of `comm` if they have symmetric memory that takes `x`, else None."""
    ask = getattr(comm, "symmetric_group", None)
    return cast("NearRanks", comm) if ask and x.dtype in _DTYPES and ask(x) else None


def gather_products(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], dim: int, group: str
) -> list[Tensor]:
    """As `ilm::gather_products`, among the ranks of a process group."""
    operands = [weight.t() for weight in weights]
    whole, results = _op("fused_all_gather_matmul")(x.contiguous(), operands, dim, group)
    added = [
        result if bias is None else result + bias
        for result, bias in zip(results, biases, strict=True)
    ]
    return [*(each.contiguous() for each in added), whole.contiguous()]


def products_scatter(
    xs: list[Tensor], weights: list[Tensor], bias: Tensor | None, dim: int, group: str
) -> Tensor:
    """As `ilm::products_scatter`, among the ranks of a process group.

    Several products are one, of the operands beside each other. A bias is partial as the products
    are: it is added where a rank multiplies, by one column more.
    """
    columns, rows = [*xs], [weight.t() for weight in weights]
    if bias is not None:
        columns.append(xs[0].new_ones((*xs[0].shape[:-1], 1)))
        rows.append(bias.unsqueeze(0))
    x, weight = (
        each[0] if len(each) == 1 else torch.cat(each, dim)
        for each, dim in ((columns, -1), (rows, 0))
    )
    found: Tensor = _op("fused_matmul_reduce_scatter")(x, weight, "sum", dim, group)
    return found.contiguous()


def _op(name: str) -> torch._ops.OpOverloadPacket:
    import_module("torch.distributed._symmetric_memory")  # which defines them
    found: torch._ops.OpOverloadPacket = getattr(torch.ops.symm_mem, name)
    return found
