"""InternLM's own checkpoints, written as InternEvo would: the oracle of `ilm_compile.convert`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

# The dimension along which InternEvo cuts a matrix; what is not named here is on every rank.
_CUT = {
    "embedding.weight": 1,
    "tok_embeddings.weight": 1,
    "Wqkv.weight": 0,
    "Wqkv.bias": 0,
    "wqkv.weight": 0,
    "wqkv.bias": 0,
    **{f"w{part}.{kind}": 0 for part in "qkv" for kind in ("weight", "bias")},
    "out_proj.weight": 1,
    "wo.weight": 1,
    "w1.weight": 0,
    "w3.weight": 0,
    "w2.weight": 1,
    "head.weight": 0,
    "output.weight": 0,
}
_ON_RANK_0_ALONE = ("out_proj.bias", "wo.bias")


def write_internlm_files(
    tensors: dict[str, Tensor],
    folder: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    chunks: int = 1,
    num_layers: int,
    old_names: bool = False,
) -> None:
    """``model_tp{t}_pp{p}.pt`` of full tensors. old_names: w2 and w3 as until v0.2."""
    per_part = num_layers // (pp * chunks)
    files: dict[tuple[int, int], dict[str, Tensor]] = {
        (t, p): {} for t in range(tp) for p in range(pp)
    }
    for name, value in tensors.items():
        place, local = _stage(name, per_part, pp * chunks)
        p, chunk = place % pp, place // pp
        prefix = f"{chunk}.model." if chunks > 1 else "model."
        if old_names:
            local = local.replace(".w2.", ".w?.").replace(".w3.", ".w2.").replace(".w?.", ".w3.")
        for t in range(tp):
            if t and name.endswith(_ON_RANK_0_ALONE):
                continue
            files[t, p][prefix + local] = _part(name, value, t, tp)
    folder.mkdir(parents=True, exist_ok=True)
    for (t, p), state in files.items():
        torch.save(_in_one_buffer(state), folder / f"model_tp{t}_pp{p}.pt")


def _stage(name: str, per_part: int, num_parts: int) -> tuple[int, str]:
    words = name.split(".")
    if words[0] in ("blocks", "layers"):
        layer = int(words[1])
        return layer // per_part, ".".join([words[0], str(layer % per_part), *words[2:]])
    return (0 if "embedding" in words[0] else num_parts - 1), name


def _part(name: str, value: Tensor, rank: int, size: int) -> Tensor:
    dim = next((d for end, d in _CUT.items() if name.endswith(end)), None)
    if dim is None:
        return value
    if "Wqkv" in name:
        return torch.cat([third.chunk(size)[rank] for third in value.chunk(3)])
    return value.chunk(size, dim)[rank].contiguous()


def _in_one_buffer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of one flat storage, as InternEvo's optimizer leaves the parameters."""
    flat = torch.cat([value.flatten() for value in state.values()])
    views = {}
    start = 0
    for name, value in state.items():
        views[name] = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
    return views
