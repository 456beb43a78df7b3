"""How pictures call a rank: its number, and where on the mesh it is."""

from __future__ import annotations

from ilm_compile.runtime.mesh import Mesh


def rank_words(mesh: Mesh, pp_rank: int) -> str:
    """The rank that stands for a pipeline rank, with its coordinates if there are others beside it.

    Such as "rank 4 (pp 1, dp 0, tp 0)": only axes that several ranks share are named.
    """
    sizes = {"pp": mesh.pp.size, "dp": mesh.dp.size, "tp": mesh.tp.size}
    place = {"pp": pp_rank, "dp": 0, "tp": 0}
    words = ", ".join(f"{axis} {place[axis]}" for axis, size in sizes.items() if size > 1)
    is_one_of_several = mesh.dp.size * mesh.tp.size > 1
    return f"rank {mesh.rank_at(pp_rank, 0, 0)}" + (f" ({words})" if is_one_of_several else "")
