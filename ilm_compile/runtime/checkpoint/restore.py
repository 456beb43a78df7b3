"""Puts what a checkpoint holds into this rank's tensors, whatever plan it was saved under."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ilm_compile.runtime.checkpoint.boxes import Box, boxes_of
from ilm_compile.runtime.checkpoint.contents import group_names, group_options, local_of
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import Manifest
from ilm_compile.runtime.checkpoint.slices import SliceReader
from ilm_compile.runtime.parallel import Parallel
from ilm_compile.runtime.shard import Shard


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


def restore_model(reader: SliceReader, parallel: Parallel) -> None:
    """Load the parameters and buffers of this rank; second copies follow by themselves."""
    fill_model(lambda name, box: reader.read(f"model/{name}", box), parallel)


def fill_model(read: Callable[[str, Box], Tensor], parallel: Parallel) -> None:
    """Overwrite this rank's parameters and persistent buffers by what `read` gives of each."""
    for shard in parallel.parameters.shards.values():
        if shard.variable.is_parameter or shard.variable.persistent:
            name = shard.variable.name
            _fill(shard.local, partial(read, name), shard, parallel)


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


def restore_optimizer(reader: SliceReader, parallel: Parallel, optimizer: Optimizer) -> None:
    """Replace the optimizer's state and the numbers of its param groups."""
    keys: dict[str, list[str]] = {}
    for name in reader.manifest.tensors:
        if name.startswith("optimizer/"):
            _, key, parameter = name.split("/", 2)
            keys.setdefault(parameter, []).append(key)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        on_device = bool(group.get("fused") or group.get("capturable"))
        own = {id(p) for p in group["params"]}
        for shard in parallel.parameters.parameters():
            name = shard.variable.name
            if id(shard.public) in own and name in keys:
                optimizer.state[shard.public] = {
                    key: _state(f"optimizer/{key}/{name}", shard, reader, parallel, on_device)
                    for key in keys[name]
                }
    for group, saved in zip(optimizer.param_groups, reader.manifest.groups, strict=True):
        for key in group_options(optimizer)[0]:
            if key in saved:
                _set_option(group, key, saved[key])


def restore_random(reader: SliceReader, parallel: Parallel) -> None:
    """Set this rank's generators; rank r of more ranks than saved gets those of r modulo saved."""
    rank = parallel.mesh.rank % reader.manifest.world_size
    prefix = f"random/{rank}/"
    torch.set_rng_state(reader.read(f"{prefix}torch"))
    version, internal, gauss = _json(reader.read(f"{prefix}python"))
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = _json(reader.read(f"{prefix}numpy"))
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    device = parallel.mesh.device
    if device.type == "cuda" and f"{prefix}cuda" in reader.manifest.tensors:
        torch.cuda.set_rng_state(reader.read(f"{prefix}cuda"), device)


def _fill(local: Tensor, read: Callable[[Box], Tensor], shard: Shard, parallel: Parallel) -> None:
    for held in boxes_of(shard, parallel.mesh):
        with torch.no_grad():
            held.own.of(local).copy_(read(held.full))


def _state(
    name: str, shard: Shard, reader: SliceReader, parallel: Parallel, on_device: bool
) -> Tensor | bool | int | float:
    """One entry of a parameter's optimizer state, as `torch.optim` lays it out."""
    record = reader.manifest.tensors[name]
    if not record.shape and (shard.variable.shape or name.startswith("optimizer/step/")):
        value = reader.read(name)
        if record.is_number:
            number: bool | int | float = value.item()
            return number
        return value.to(parallel.mesh.device) if on_device else value
    if record.shape != shard.variable.user_shape:
        raise CheckpointError(
            f"{name}: expected shape {list(shard.variable.user_shape)}, got {list(record.shape)}"
        )
    # Zeros where the compiler padded: those elements have no gradient and never move.
    whole = torch.zeros_like(shard.public, dtype=record.dtype, requires_grad=False)
    _fill(local_of(whole), partial(reader.read, name), shard, parallel)
    return whole


def _set_option(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), Tensor):
        group[key].fill_(value)
    else:
        group[key] = tuple(value) if isinstance(value, list) else value


def _json(value: Tensor) -> Any:
    return json.loads(bytes(value.tolist()))
