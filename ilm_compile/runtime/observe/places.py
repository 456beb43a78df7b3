"""How pictures call a rank: its number, and where on the mesh it is."""

from __future__ import annotations

from ilm_compile.runtime.mesh import RANK_ORDER, Mesh


def rank_words(mesh: Mesh, pp_rank: int) -> str:
    """The rank that stands for a pipeline rank, with its coordinates if there are others beside it.

    Such as "rank 4 (pp 1, dp 0, tp 0)": only axes that several ranks share are named.
    """
    axes = {name: getattr(mesh, name) for name in RANK_ORDER}
    place = {name: pp_rank if name == "pp" else 0 for name, axis in axes.items() if axis.size > 1}
    words = ", ".join(f"{name} {number}" for name, number in place.items())
    is_one_of_several = mesh.fsdp.size * mesh.tp.size > 1
    return f"rank {mesh.rank_at(pp_rank, 0, 0)}" + (f" ({words})" if is_one_of_several else "")
