"""How many bytes the forward of each region keeps for its backward, measured in a running step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ilm_compile.program.lowered import Stage


class SavedBytes:
    """Watches the first forward of each of `stages` between `start` and `stop`.

    bytes: by stage index and region name (a child of the stage's module, "" for what lies between
    them). Counted are the storages that autograd saves, each once, in the region that saves it
    first; parameters, buffers and the batch are not. A region that is recomputed keeps its inputs.
    """

    def __init__(self, stages: list[Stage]) -> None:
        self.bytes: dict[int, dict[str, int]] = {}
        self._stages = stages
        self._handles: list[RemovableHandle] = []
        self._hooks: Any = None
        self._stage: Stage | None = None
        self._region = ""
        self._seen: set[int] = set()
        self._parameters: set[int] = set()

    def start(self) -> None:
        for stage in self._stages:
            self._on_call(stage.module, self._enter_stage, stage)
            self._handles.append(stage.module.register_forward_hook(self._leave_stage))
            for name, child in stage.module.named_children():
                self._on_call(child, self._enter_region, name)
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def stop(self) -> None:
        if self._hooks is not None:
            self._hooks.__exit__()
        for handle in self._handles:
            handle.remove()
        self._hooks, self._handles = None, []

    def _on_call(self, module: nn.Module, function: Any, argument: Any) -> None:
        hook = module.register_forward_pre_hook(lambda module, args: function(argument, args))
        self._handles.append(hook)

    def _enter_stage(self, stage: Stage, args: tuple[Tensor, ...]) -> None:
        if stage.index not in self.bytes:
            self._stage = stage
            self.bytes[stage.index] = {}
            batch = args[: len(stage.batch_inputs)]
            self._seen = {tensor.untyped_storage().data_ptr() for tensor in batch}
            self._enter_region("", args)

    def _enter_region(self, name: str, args: tuple[Tensor, ...]) -> None:
        if self._stage is not None:
            self._region = name
            self._parameters = set(_storages(self._stage.module))

    def _leave_stage(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stage = None

    def _pack(self, tensor: Tensor) -> Tensor:
        if self._stage is not None:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen | self._parameters:
                self._seen.add(storage.data_ptr())
                regions = self.bytes[self._stage.index]
                regions[self._region] = regions.get(self._region, 0) + storage.nbytes()
        return tensor


def _storages(module: nn.Module) -> Iterator[int]:
    """The addresses of buffers and parameters, those gathered for the moment among them."""
    with torch.no_grad():
        for held in (*module.parameters(), *module.buffers()):
            local = held.to_local() if isinstance(held, DTensor) else held
            yield local.untyped_storage().data_ptr()
