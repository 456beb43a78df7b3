"""Initial values of parameters and buffers, one at a time, the same bits under every plan.

A value comes from the first that has it: the user's real tensor; the model's own
``initializer(name, rows=(start, stop) or None, seed=seed)``, which gives the float32 values of rows
start to stop; or, for any other model on the meta device, the module that owns the tensor, rebuilt
on the CPU on its own and initialised there as its constructor would.
The random numbers of a rebuilt module depend on the seed and the module's name only.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.layout import Place
from ilm_compile.program.parameter_map import ParameterMap
from ilm_compile.program.program import Variable

ALONE = Place()


class InitialValues:
    """Reads or computes the values of `model`, which may be on the meta device in part or whole.

    model: or its parameters and buffers by name, all of them real.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        *,
        seed: int,
        initializer: Callable[..., Tensor] | None = None,
        maps: Sequence[ParameterMap] = (),
    ) -> None:
        self._model = nn.Module() if isinstance(model, Mapping) else model
        self._seed = seed
        self._tensors: dict[str, Tensor] = (
            dict(model) if isinstance(model, Mapping) else tensors_of(model)
        )
        self._initializer = initializer
        self._made = {name: each for each in maps for name in each.targets}
        self._rebuilt: tuple[str, dict[str, Tensor]] = ("", {})

    def shard(self, variable: Variable, place: Place = ALONE) -> Tensor:
        """The part of `variable` that the rank at `place` holds, in the variable's dtype.

        May alias the user's tensor. At most one full variable is in memory at a time.
        """
        name = variable.name
        initializer = self._initializer_of(variable)
        cuts = variable.layout.shards(place.sizes)
        is_plain = all(p.dim == 0 and not p.segments for _, p in cuts) and not variable.padding
        if initializer is not None and cuts and is_plain:
            start, rows = 0, variable.shape[0]
            for axis, _ in cuts:
                rows //= place.sizes[axis]
                start += rows * place.ranks[axis]
            part = initializer(name, rows=(start, start + rows), seed=self._seed)
            return part.to(variable.dtype)
        full = variable.pad(self._full(variable).to(variable.dtype))
        return variable.layout.cut(full, place)

    def checksums(self) -> dict[str, float]:
        """The sum of each real tensor, to tell models of different random numbers apart."""
        return {
            name: tensor.detach().sum(dtype=torch.float64).nan_to_num().item()
            for name, tensor in self._tensors.items()
            if not tensor.is_meta
        }

    def _initializer_of(self, variable: Variable) -> Callable[..., Tensor] | None:
        """The model's own initialiser, if `variable` is a parameter without a value."""
        if not variable.is_parameter or variable.name in self._made:
            return None
        value = self._tensors.get(variable.name)
        return self._initializer if value is not None and value.is_meta else None

    def _full(self, variable: Variable) -> Tensor:
        name = variable.name
        if (made := self._made.get(name)) is not None:
            sources = {s.name: self._full(s).to(s.dtype) for s in made.sources}
            return made.forward(sources)[name]
        if name not in self._tensors:
            raise IlmCompileError(
                f"initial values: the program needs {name} of shape {variable.user_shape}, which "
                "is not among the values given; give every parameter and buffer of the model"
            )
        if not self._tensors[name].is_meta:
            return self._tensors[name].detach()
        if (initializer := self._initializer_of(variable)) is not None:
            return initializer(name, seed=self._seed)
        path, _, leaf = name.rpartition(".")
        if self._rebuilt[0] != path or not self._rebuilt[1]:
            self._rebuilt = (path, self._rebuild(path))
        value = self._rebuilt[1][leaf]
        if not _is_written(value):
            kind = "parameter" if variable.is_parameter else "buffer"
            owner = type(self._model.get_submodule(path)).__name__
            raise IlmCompileError(
                f"initial values: the model is on the meta device and nothing computes the {kind} "
                f"{name}; expected {owner}.reset_parameters() or {type(self._model).__name__}"
                "._init_weights(module) to fill it; add one of them or build the model on the CPU"
            )
        return value

    def _rebuild(self, path: str) -> dict[str, Tensor]:
        """The tensors that the module at `path` owns, initialised on the CPU.

        The order is that of a constructor: the module's own `reset_parameters`, then the model's
        ``_init_weights`` for the module and for every module around it (Hugging Face, nanoGPT),
        which see the rest of the model on the meta device.
        """
        owner = _shell(self._model.get_submodule(path))
        owned = {
            name: _unwritten(tensor)
            for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]
            if tensor is not None
        }
        for table in (owner._parameters, owner._buffers):
            table.update({name: owned[name] for name in table if name in owned})  # type: ignore[misc]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(_hash(self._seed, path))
            if callable(reset_parameters := getattr(owner, "reset_parameters", None)):
                reset_parameters()
            init_weights = getattr(self._model, "_init_weights", None)
            parts = path.split(".") if path else []
            while callable(init_weights):
                init_weights(owner)
                if not parts:
                    break
                outer = _shell(self._model.get_submodule(".".join(parts[:-1])))
                outer._modules[parts.pop()] = owner
                owner = outer
        return owned


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _shell(module: nn.Module) -> nn.Module:
    """A copy of `module` that shares its tensors and children but not the tables that hold them."""
    shell = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        shell.__dict__[table] = dict(getattr(module, table))
    return shell


def _unwritten(tensor: Tensor) -> Tensor:
    """An empty CPU tensor in which `_is_written` can see whether somebody filled it."""
    is_real = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    value: Any = torch.nan if is_real else 0
    empty = torch.full(tensor.shape, value, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _is_written(tensor: Tensor) -> bool:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return not bool(tensor.isnan().any())
    return tensor._version > 0  # writes through .data do not count, but nobody inits integers so


def _hash(seed: int, path: str) -> int:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
