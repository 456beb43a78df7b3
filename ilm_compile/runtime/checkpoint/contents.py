"""What a rank puts into a checkpoint: host copies of its slices, and the optimizer's groups."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ilm_compile.runtime.checkpoint.boxes import Box, boxes_of, whole
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.mapped import (
    Mapped,
    check_moves,
    gather_mapped,
    holder,
    mapped_groups,
    names_of,
)
from ilm_compile.runtime.checkpoint.tensor_file import DTYPE_NAMES
from ilm_compile.runtime.parallel import Parallel
from ilm_compile.runtime.shard import Shard

# Of a param group: which code runs, not what it computes; chosen anew on the machine at hand.
_OF_THE_MACHINE = {"params", "foreach", "fused", "capturable", "differentiable"}


class Stateful(Protocol):
    """Schedulers, loss scaler, data loader, trainer: their state is plain JSON."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state."""

    def load_state_dict(self, state: Any) -> Any:
        """Go on where `state` was taken."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`value`, on the host and of its own memory, is `box` of the full tensor `name`."""

    name: str
    shape: tuple[int, ...]
    box: Box
    value: Tensor
    is_number: bool = False


def model_pieces(parallel: Parallel) -> Iterator[Piece]:
    """This rank's slices of parameters and persistent buffers, each by one rank of the job.

    Without those that passes have made: `mapped_pieces`.
    """
    for shard in _counted(parallel):
        if shard.variable.is_parameter or shard.variable.persistent:
            yield from _cut(f"model/{shard.variable.name}", shard, shard.local, parallel)


def optimizer_pieces(parallel: Parallel, optimizer: Optimizer) -> Iterator[Piece]:
    """Slices of what the optimizer keeps per parameter: ``optimizer/KEY/NAME``.

    A tensor of the parameter's shape is cut like it; a single number is kept as a scalar.
    """
    for shard in _counted(parallel):
        for key, value in optimizer.state.get(shard.public, {}).items():
            name = f"optimizer/{key}/{shard.variable.name}"
            if isinstance(value, Tensor) and value.shape == shard.public.shape and value.ndim:
                yield from _cut(name, shard, local_of(value), parallel)
            elif isinstance(value, Tensor) and value.ndim == 0:
                yield from _number(name, value, parallel, is_number=False)
            elif isinstance(value, bool | int | float):
                yield from _number(name, _as_tensor(value), parallel, is_number=True)
            else:
                raise CheckpointError(
                    f"checkpoint: {type(optimizer).__name__} keeps {key} of {shard.variable.name} "
                    f"as {type(value).__name__} {tuple(getattr(value, 'shape', ()))}; expected a "
                    f"number or a tensor of shape {tuple(shard.public.shape)}"
                )


def mapped_pieces(parallel: Parallel, optimizer: Optimizer | None) -> Iterator[Piece]:
    """What passes have made of the model's parameters, whole, by one rank each. Collective."""
    groups = mapped_groups(parallel)
    if optimizer is not None:
        check_moves(groups)
    for group in groups:
        yield from _whole("model/", gather_mapped(parallel, group, lambda shard: shard.local))
        if optimizer is not None:
            yield from _mapped_state(parallel, optimizer, group)


def _mapped_state(parallel: Parallel, optimizer: Optimizer, group: Mapped) -> Iterator[Piece]:
    shards = parallel.parameters.shards
    held = [shards[name] for name in group.program if name in shards]
    states = [optimizer.state.get(shard.public, {}) for shard in held]
    # All of a group's parameters have been trained, or none: they came from one pass.
    for key in states[0] if states and all(states) else ():
        value = states[0][key]
        if isinstance(value, Tensor) and value.ndim:
            pick = partial(_state_of, optimizer, key)
            yield from _whole(f"optimizer/{key}/", gather_mapped(parallel, group, pick))
            continue
        is_number = not isinstance(value, Tensor)
        for variable in group.model:
            name = f"optimizer/{key}/{variable.name}"
            if parallel.mesh.pp.rank == holder(parallel, group):
                scalar = _as_tensor(value) if is_number else value
                yield from _number(name, scalar, parallel, is_number=is_number)


def _state_of(optimizer: Optimizer, key: str, shard: Shard) -> Tensor:
    value: Tensor = optimizer.state[shard.public][key]
    return local_of(value)


def _whole(prefix: str, full: Mapping[str, Tensor]) -> Iterator[Piece]:
    for name, value in full.items():
        yield Piece(prefix + name, tuple(value.shape), whole(value.shape), value)


def local_of(value: Tensor) -> Tensor:
    """This rank's memory of a tensor that may be a DTensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def group_names(parallel: Parallel, optimizer: Optimizer) -> list[list[str]]:
    """The names of this rank's parameters in each param group, as in the user's model."""
    names = {id(parameter): [name] for name, parameter in parallel.named_parameters()}
    for name, group in names_of(mapped_groups(parallel)):
        if (shard := parallel.parameters.shards.get(name)) is not None:
            names[id(shard.public)] = [variable.name for variable in group.model]
    groups = []
    for options in optimizer.param_groups:
        strangers = [p for p in options["params"] if id(p) not in names]
        if strangers:
            raise CheckpointError(
                "checkpoint: the optimizer holds a tensor of shape "
                f"{tuple(strangers[0].shape)} that is no parameter of the model; expected the "
                "tensors of parallel.named_parameters(), with everything else in optimizer.state"
            )
        groups.append([name for p in options["params"] for name in names[id(p)]])
    return groups


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The numbers of each param group: lr, betas, weight decay and so on."""
    return [
        {
            key: value.item() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key not in _OF_THE_MACHINE
        }
        for group in optimizer.param_groups
    ]


def random_pieces(rank: int, device: torch.device) -> Iterator[Piece]:
    """The states of this rank's random number generators: torch, its device, Python and numpy."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numpy_state = [kind, np.asarray(keys).tolist(), position, has_gauss, gauss]
    states = {
        "torch": torch.get_rng_state(),
        "python": _json_tensor(random.getstate()),
        "numpy": _json_tensor(numpy_state),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    for source, value in states.items():
        shape = tuple(value.shape)
        yield Piece(f"random/{rank}/{source}", shape, whole(shape), value)


def plain_states(states: Mapping[str, Stateful]) -> dict[str, Any]:
    """The states of all objects. Raises `CheckpointError` naming one that is not plain JSON."""
    plain: dict[str, Any] = {}
    for name, owner in states.items():
        state = dict(owner.state_dict())
        try:
            plain[name] = json.loads(json.dumps(state))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint: the state of {name} ({type(owner).__name__}) is not plain JSON: "
                f"{error}; checkpoints hold no pickles"
            ) from None
    return plain


def _counted(parallel: Parallel) -> Iterable[Shard]:
    parameters = parallel.parameters
    mapped = dict(names_of(mapped_groups(parallel)))
    return (
        shard
        for name, shard in parameters.shards.items()
        if name not in mapped and parameters.counts(shard)
    )


def _cut(name: str, shard: Shard, local: Tensor, parallel: Parallel) -> Iterator[Piece]:
    if local.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"checkpoint: {name} is {local.dtype}, which safetensors cannot hold")
    for held in boxes_of(shard, parallel.mesh):
        value = held.own.of(local.detach()).to("cpu", copy=True).contiguous()
        yield Piece(name, shard.variable.user_shape, held.full, value)


def _number(name: str, value: Tensor, parallel: Parallel, *, is_number: bool) -> Iterator[Piece]:
    """A scalar that all ranks which hold a part of the parameter have alike: by the first."""
    mesh = parallel.mesh
    if mesh.is_first_replica:
        copy = local_of(value).detach().to("cpu", copy=True)
        yield Piece(name, (), whole(()), copy, is_number)


def _as_tensor(value: float) -> Tensor:
    dtype = {bool: torch.bool, int: torch.int64}.get(type(value), torch.float64)
    return torch.tensor(value, dtype=dtype)


def _json_tensor(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
