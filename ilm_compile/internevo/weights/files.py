"""A source of InternLM's own checkpoints: ``model_tp{t}_pp{p}.pt`` and the like in one folder.

Layout (InternEvo internlm/checkpoint/components.py and internlm/model/*): every file has the part
of one tensor-parallel and pipeline rank. Layers are numbered within their stage; with several
chunks the names begin with the chunk's number, and chunk c of the last stage comes before chunk
c + 1 of the first. Tensors are cut into equal parts along the dimension in which the part is
smaller; the fused ``Wqkv`` of InternLM inside q, k and v each; ``out_proj.bias`` is on rank 0
alone. Under "isp" the files are ``model_tp{t}_wp{w}_pp{p}.pt``, later ``model_wp{w}_pp{p}.pt``:
weight-parallel rank w has part w of each matrix, of ``Wqkv`` as it stands, and the tensor rank
makes no difference. Until v0.2 the second and third matrix of the MLP had each other's names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ilm_compile.convert.source import Spec, assemble
from ilm_compile.convert.torch_file import TorchFile
from ilm_compile.errors import IlmCompileError
from ilm_compile.models.hf_rules import IGNORED_SUFFIX
from ilm_compile.program.layout import Layout, Place
from ilm_compile.program.placement import I, Placement, S
from ilm_compile.program.program import Variable
from ilm_compile.runtime.checkpoint.boxes import Box, Held, held_boxes

Shape = tuple[int, ...]
_FILE = re.compile(r"model(?:_tp(?P<tp>\d+))?(?:_wp(?P<wp>\d+))?_pp(?P<pp>\d+)\.pt")
_NAME = re.compile(r"(?:(?P<chunk>\d+)\.)?(?:model\.)?(?P<rest>.+)")
_LAYER = re.compile(r"(?P<list>blocks|layers)\.(?P<index>\d+)\.(?P<rest>.+)")
_EMBEDDING = {"embedding.word_embeddings.weight": "embedding.weight"}
Key = tuple[int, int]  # rank among those that share a matrix, and pipeline rank


class InternLMFiles:
    """The full tensors of all files. `shapes`: of the model's parameters, by name."""

    def __init__(self, folder: Path, shapes: Mapping[str, Shape]) -> None:
        self.where = str(folder)
        self._files, self._by_weight = _open_all(folder)
        self._tp = 1 + max(tp for tp, _ in self._files)
        # Of each full tensor, the pipeline rank that has it and its name there.
        self._places = self._number_layers()
        self._shapes = shapes
        self._swap_old_names()
        self._specs = {
            name: Spec(self._full_shape(name), self._part(name, 0)[1]) for name in self._places
        }
        for name in self._specs:
            self._boxes(name)  # raises if the parts do not make the full tensor

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def read(self, name: str, box: Box) -> Tensor:
        pp, own_name = self._places[name]
        pieces: list[tuple[Held, Callable[[Box], Tensor]]] = []
        for rank, helds in enumerate(self._boxes(name)):
            file = self._files[rank, pp]
            pieces += [(held, _reader(file, own_name)) for held in helds]
        return assemble(self._specs[name], box, pieces)

    def _number_layers(self) -> dict[str, tuple[int, str]]:
        """Names with the layer's number in the whole model."""
        parsed: dict[tuple[int, int], list[tuple[str, str]]] = {}
        for pp in sorted({pp for _, pp in self._files}):
            for own in self._files[0, pp].entries:
                match = _NAME.fullmatch(own)
                assert match is not None
                rest = match["rest"]
                if not rest.endswith(IGNORED_SUFFIX):
                    parsed.setdefault((int(match["chunk"] or 0), pp), []).append((rest, own))
        places: dict[str, tuple[int, str]] = {}
        first = 0
        for chunk, pp in sorted(parsed):
            names = parsed[chunk, pp]
            layers = [int(m["index"]) for rest, _ in names if (m := _LAYER.fullmatch(rest))]
            for rest, own in names:
                if (layer := _LAYER.fullmatch(rest)) is not None:
                    rest = f"{layer['list']}.{first + int(layer['index'])}.{layer['rest']}"
                name = _EMBEDDING.get(rest, rest).replace(".mixer.wqkv.", ".mixer.Wqkv.")
                if name in places:
                    raise IlmCompileError(f"{self.where}: {name} is on two pipeline ranks")
                places[name] = (pp, own)
            first += 1 + max(layers, default=-1)
        return places

    def _swap_old_names(self) -> None:
        """Give w2 and w3 of v0.2 their present names: w2 was made like w1, and w3 was not."""
        for name in [n for n in self._places if n.endswith(".w1.weight")]:
            second, third = (name.replace(".w1.", f".{other}.") for other in ("w2", "w3"))
            if not {second, third} <= set(self._places):
                continue
            shapes = [self._part(n, 0)[0] for n in (name, second, third)]
            if shapes[0] == shapes[1] != shapes[2]:
                places = self._places
                places[second], places[third] = places[third], places[second]

    def _part(self, name: str, rank: int) -> tuple[Shape, torch.dtype]:
        pp, own = self._places[name]
        entry = self._files[rank, pp].entries.get(own)
        if entry is None:
            raise IlmCompileError(f"{self._files[rank, pp].path}: {own} is missing")
        return entry.shape, entry.dtype

    def _full_shape(self, name: str) -> Shape:
        if name not in self._shapes:
            return self._part(name, 0)[0]  # refused later, with all the others, by its name
        return self._shapes[name]

    def _boxes(self, name: str) -> list[list[Held]]:
        """The boxes of each tensor-parallel rank; none where another rank has the same."""
        spec = self._specs[name]
        placement = self._placement(name, spec.shape)
        variable = Variable(
            name, spec.shape, spec.dtype, True, True, layout=Layout.of({"tp": placement})
        )
        if not placement.is_shard:
            return [held_boxes(variable, Place())]
        for rank in range(self._tp):
            shape = placement.local_shape(spec.shape, self._tp)
            if self._part(name, rank) != (shape, spec.dtype):
                raise IlmCompileError(
                    f"{self.where}: {name}: expected shape {shape} {spec.dtype} on tensor-parallel "
                    f"rank {rank}, got {self._part(name, rank)}"
                )
        places = [Place({"tp": self._tp}, {"tp": rank}) for rank in range(self._tp)]
        return [held_boxes(variable, place) for place in places]

    def _placement(self, name: str, full: Shape) -> Placement:
        part, _ = self._part(name, 0)
        if part == full:
            return I
        cut = [d for d in range(len(full)) if len(part) == len(full) and part[d] != full[d]]
        if len(cut) != 1 or part[cut[0]] * self._tp != full[cut[0]]:
            raise IlmCompileError(
                f"{self.where}: {name}: expected a part of shape {full} on each of {self._tp} "
                f"tensor-parallel ranks, got {part}; is MODEL that of the checkpoint?"
            )
        if ".Wqkv." in name and cut[0] == 0 and not self._by_weight:
            return S(0, (full[0] // 3,) * 3)
        return S(cut[0])


def _open_all(folder: Path) -> tuple[dict[Key, TorchFile], bool]:
    """The files by key, and whether the ranks that share a matrix are weight-parallel ones."""
    matches = [m for p in sorted(folder.glob("model_*.pt")) if (m := _FILE.fullmatch(p.name))]
    if not matches:
        raise IlmCompileError(f"expected model_tp0_pp0.pt and so on in {folder}, found none")
    by_weight = matches[0]["wp"] is not None
    if any((m["wp"] is not None) != by_weight for m in matches):
        raise IlmCompileError(
            f"{folder}: expected the files of one checkpoint, found {matches[0].string} and names "
            "of another kind; move one checkpoint elsewhere"
        )
    axis = "wp" if by_weight else "tp"
    found: dict[Key, Path] = {}
    for match in matches:  # in order of names: of equal ones the first is taken
        found.setdefault((int(match[axis] or 0), int(match["pp"])), folder / match.string)
    size, pp = (1 + max(key[place] for key in found) for place in range(2))
    missing = [(t, p) for p in range(pp) for t in range(size) if (t, p) not in found]
    if missing:
        raise IlmCompileError(
            f"{folder}: expected files of {size} x {pp} ranks, model_{axis}{missing[0][0]}_pp"
            f"{missing[0][1]}.pt is missing"
        )
    return {key: TorchFile(path) for key, path in found.items()}, by_weight


def _reader(file: TorchFile, name: str) -> Callable[[Box], Tensor]:
    return lambda box: file.read(name, box)
