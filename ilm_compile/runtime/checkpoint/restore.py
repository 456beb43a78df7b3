"""Puts what a checkpoint holds into this rank's tensors, whatever plan it was saved under."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ilm_compile.runtime.checkpoint.boxes import Box, boxes_of, whole
from ilm_compile.runtime.checkpoint.contents import group_names, group_options, local_of
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import Manifest
from ilm_compile.runtime.checkpoint.mapped import mapped_groups, names_of
from ilm_compile.runtime.checkpoint.slices import TensorReader
from ilm_compile.runtime.parallel import Parallel
from ilm_compile.runtime.shard import Shard

INITIAL = "initial_"
ReadBox = Callable[[str, Box], Tensor]


class ProgramView:
    """Reads the program's tensors where only those of the user's model can be read.

    prefix: what `read` wants before the name of a parameter, for states that are cut like it.
    """

    def __init__(self, read: ReadBox, parallel: Parallel) -> None:
        self._read = read
        self.shapes = {n: v.user_shape for n, v in parallel.saved_variables().items()}
        self._mapped = dict(names_of(mapped_groups(parallel)))
        self._last: tuple[tuple[str, str], dict[str, Tensor]] = (("", ""), {})

    def model_name(self, name: str) -> str:
        """The tensor of the model that `name` of the program is, or the first it was made of."""
        return self._mapped[name].model[0].name if name in self._mapped else name

    def read(self, prefix: str, name: str, box: Box) -> Tensor:
        """A box of a tensor of the program; what passes have made is made anew, group by group."""
        group = self._mapped.get(name)
        if group is None:
            return self._read(prefix + name, box)
        key = (prefix, group.program[0])
        if self._last[0] != key:
            self._last = (("", ""), {})
            names = [variable.name for variable in group.model]
            full = {n: self._read(prefix + n, whole(self.shapes[n])) for n in names}
            self._last = (key, group.to_program(full))
        return box.of(self._last[1][name])


def check_model(manifest: Manifest, parallel: Parallel, where: str) -> None:
    """Raise `CheckpointError` unless the checkpoint's model has the names, shapes and dtypes."""
    saved = {
        name.removeprefix("model/"): record
        for name, record in manifest.tensors.items()
        if name.startswith("model/")
    }
    wanted = parallel.saved_variables()
    if set(saved) != set(wanted):
        missing, extra = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
        raise CheckpointError(
            f"{where}: is of another model: missing {missing[:5]}, unexpected {extra[:5]}"
        )
    for name, variable in wanted.items():
        got, expected = saved[name], (variable.user_shape, variable.dtype)
        if (got.shape, got.dtype) != expected:
            raise CheckpointError(
                f"{where}: is of another model: {name}: expected {list(expected[0])} "
                f"{expected[1]}, got {list(got.shape)} {got.dtype}"
            )


def restore_model(reader: TensorReader, parallel: Parallel) -> None:
    """Load the parameters and buffers of this rank; second copies follow by themselves."""
    fill_model(lambda name, box: reader.read(f"model/{name}", box), parallel)


def fill_model(read: ReadBox, parallel: Parallel) -> None:
    """Overwrite this rank's parameters and persistent buffers.

    read: gives a box of a tensor of the user's model, by name.
    """
    view = ProgramView(read, parallel)
    for shard in parallel.parameters.shards.values():
        if shard.variable.is_parameter or shard.variable.persistent:
            _fill(shard.local, "", view, shard, parallel)


def check_groups(manifest: Manifest, parallel: Parallel, optimizer: Optimizer, where: str) -> None:
    """Raise `CheckpointError` unless each parameter is in the param group it was saved in."""
    groups = group_names(parallel, optimizer)
    if len(groups) != len(manifest.groups):
        raise CheckpointError(
            f"{where}: expected {len(groups)} param groups, got {len(manifest.groups)}; resume "
            "with the optimizer it was saved with"
        )
    for index, (names, group) in enumerate(zip(groups, manifest.groups, strict=True)):
        strangers = sorted(set(names) - set(group["params"]))
        if strangers:
            raise CheckpointError(
                f"{where}: the optimizer has {strangers[0]} in param group {index}, the checkpoint "
                "has not; resume with the optimizer it was saved with"
            )


def changed_options(manifest: Manifest, optimizer: Optimizer) -> list[str]:
    """The numbers of param groups that differ from the saved ones, as "lr 0.1 -> 0.01".

    Without those that a schedule moves: it has left beside them what they began with, as torch's do
    with "initial_lr".
    """
    found: dict[str, None] = {}
    for own, saved in zip(group_options(optimizer), manifest.groups, strict=True):
        for key, value in json.loads(json.dumps(own)).items():
            is_moved = key.startswith(INITIAL) or INITIAL + key in own
            if not is_moved and key in saved and saved[key] != value:
                found[f"{key} {saved[key]} -> {value}"] = None
    return list(found)


def restore_optimizer(
    reader: TensorReader, parallel: Parallel, optimizer: Optimizer, *, options: bool = True
) -> None:
    """Replace the optimizer's state and, with `options`, the numbers of its param groups."""
    keys: dict[str, list[str]] = {}  # of each parameter of the model
    for name in reader.manifest.tensors:
        if name.startswith("optimizer/"):
            _, key, parameter = name.split("/", 2)
            keys.setdefault(parameter, []).append(key)
    view = ProgramView(reader.read, parallel)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        on_device = bool(group.get("fused") or group.get("capturable"))
        own = {id(p) for p in group["params"]}
        for shard in parallel.parameters.parameters():
            name = view.model_name(shard.variable.name)
            if id(shard.public) in own and name in keys:
                optimizer.state[shard.public] = {
                    key: _state(key, shard, view, reader, parallel, on_device) for key in keys[name]
                }
    for group, saved in zip(optimizer.param_groups, reader.manifest.groups, strict=True):
        if not options:
            break
        for key in group_options(optimizer)[0]:
            if key in saved:
                _set_option(group, key, saved[key])


def restore_random(reader: TensorReader, parallel: Parallel) -> None:
    """Set this rank's generators; rank r of more ranks than saved gets those of r modulo saved."""
    rank = parallel.mesh.rank % reader.manifest.world_size
    prefix = f"random/{rank}/"
    torch.set_rng_state(reader.read(f"{prefix}torch"))
    version, internal, gauss = _json(reader.read(f"{prefix}python"))
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = _json(reader.read(f"{prefix}numpy"))
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    device = parallel.mesh.device
    if device.type == "cuda" and reader.has(f"{prefix}cuda"):
        torch.cuda.set_rng_state(reader.read(f"{prefix}cuda"), device)


def _fill(local: Tensor, prefix: str, view: ProgramView, shard: Shard, parallel: Parallel) -> None:
    for held in boxes_of(shard, parallel.mesh):
        with torch.no_grad():
            held.own.of(local).copy_(view.read(prefix, shard.variable.name, held.full))


def _state(
    key: str,
    shard: Shard,
    view: ProgramView,
    reader: TensorReader,
    parallel: Parallel,
    on_device: bool,
) -> Tensor | bool | int | float:
    """One entry of a parameter's optimizer state, as `torch.optim` lays it out."""
    of = view.model_name(shard.variable.name)
    name = f"optimizer/{key}/{of}"
    record = reader.manifest.tensors[name]
    if not record.shape and (shard.variable.shape or key == "step"):
        value = reader.read(name)
        if record.is_number:
            number: bool | int | float = value.item()
            return number
        return value.to(parallel.mesh.device) if on_device else value
    if record.shape != view.shapes[of]:
        raise CheckpointError(
            f"{name}: expected shape {list(view.shapes[of])}, got {list(record.shape)}"
        )
    # Zeros where the compiler padded: those elements have no gradient and never move.
    state = torch.zeros_like(shard.public, dtype=record.dtype, requires_grad=False)
    _fill(local_of(state), f"optimizer/{key}/", view, shard, parallel)
    return state


def _set_option(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), Tensor):
        group[key].fill_(value)
    else:
        group[key] = tuple(value) if isinstance(value, list) else value


def _json(value: Tensor) -> Any:
    return json.loads(bytes(value.tolist()))
