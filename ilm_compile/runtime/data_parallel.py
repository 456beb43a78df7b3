"""Data parallelism over FSDP2: who shards what, and when gradients are reduced.

Each region of a stage is sharded on its own, so that its communication overlaps the compute of its
neighbours. What regions share, and the rest of the stage, is sharded with the stage. Gradients are
summed over dp, not averaged, because the loss is normalised by the global batch; they are reduced
once a step, in the last backward of each stage or after its last weight part. What FSDP2 cannot
shard, every rank holds whole.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ilm_compile.program.lowered import Stage
from ilm_compile.program.program import Variable
from ilm_compile.runtime.expert_storage import placements
from ilm_compile.runtime.materialize import resolve


@dataclass(frozen=True, slots=True)
class Unit:
    """A module that is materialised and sharded as one, and the variables it owns."""

    module: nn.Module
    names: tuple[str, ...]


def units(stage: Stage) -> Iterator[Unit]:
    """The regions of `stage` that share no tensor with others, then the stage itself with the rest.

    Materialising and sharding one after the other, at most one region is whole in memory.
    """
    used = {child: _tensor_ids(child) for child in stage.module.children()}
    count = Counter(tensor for ids in used.values() for tensor in ids)
    left = {name: id(resolve(stage, name)) for name in stage.variables}
    for child, ids in used.items():
        if not ids or any(count[tensor] > 1 for tensor in ids):
            continue
        names = tuple(name for name, tensor in left.items() if tensor in ids)
        left = {name: tensor for name, tensor in left.items() if name not in names}
        yield Unit(child, names)
    yield Unit(stage.module, tuple(left))


def replicated(variables: Mapping[str, Variable]) -> frozenset[str]:
    """The parameters that FSDP2 does not take: scalars, and those of another dtype than most are.

    FSDP2 wants one dtype for what is trained in a module. The choice is of the whole program, so
    that all copies of a tied parameter are held alike.
    """
    parameters = [variable for variable in variables.values() if variable.is_parameter]
    elements: Counter[torch.dtype] = Counter()
    for variable in parameters:
        if variable.requires_grad:
            elements[variable.dtype] += prod(variable.shape)
    dtypes = [dtype for dtype, _ in elements.most_common(1)]
    return frozenset(
        variable.name
        for variable in parameters
        if not variable.shape or (variable.requires_grad and variable.dtype not in dtypes)
    )


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    zero: int,
    whole: Iterable[Tensor] = (),
    experts: Mapping[Tensor, int] | None = None,
    expert_mesh: DeviceMesh | None = None,
) -> None:
    """Shard the parameters of `module` that no module inside has sharded yet, but not `whole`.

    zero: 3 gives full parameters back after each forward, 1 keeps them until the step ends.
    experts: those that are sharded over `expert_mesh`, each along a dimension of its own.
    """
    # The graphs write to no tensor in place, which is what FSDP warns of when it meets a view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    ignored = {parameter for parameter in whole if isinstance(parameter, nn.Parameter)}
    place = placements(experts, expert_mesh) if experts and expert_mesh is not None else None
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=zero == 3,
        shard_placement_fn=place,
        ignored_params=ignored,
    )


class GradientSync(Protocol):
    """Switches the gradient reduction of a stage off and on within a step."""

    def defer(self) -> None:
        """Until `resume`, backwards add to unsharded gradients of this rank alone."""
        ...

    def resume(self) -> None:
        """The next backward is the stage's last of this step: it reduces and shards."""
        ...

    def reduce(self) -> None:
        """The gradients of this step are complete: reduce and shard them, without a backward."""
        ...

    def release(self) -> None:
        """Give back the full parameters that no backward has given back: the step is over."""
        ...


class ShardedSync:
    """The `GradientSync` of a stage that `shard` has sharded."""

    def __init__(self, stage: nn.Module, *, zero: int) -> None:
        assert isinstance(stage, FSDPModule)
        self._root = stage
        self._modules = [m for m in stage.modules() if isinstance(m, FSDPModule)]
        self._keep_parameters = zero == 1
        for module in self._modules:
            # Both reach one module only. Without the second, float32 gradients are scaled inside
            # the reduction (PREMUL_SUM), which gloo cannot do.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def defer(self) -> None:
        self._root.set_requires_gradient_sync(False)
        self._root.set_is_last_backward(False)
        self._root.set_reshard_after_backward(not self._keep_parameters)

    def resume(self) -> None:
        self._root.set_requires_gradient_sync(True)
        self._root.set_is_last_backward(True)
        self._root.set_reshard_after_backward(True)

    def reduce(self) -> None:
        self.resume()
        reduce_gradients(self._root)

    def release(self) -> None:
        for module in self._modules:
            module.reshard()


def reduce_gradients(root: FSDPModule) -> None:
    """Do what FSDP2 does at the end of a backward, for all that is sharded within `root`.

    FSDP2 offers no way to ask for it. torch.distributed.pipelining calls the same private method
    where it reduces after its weight parts (`_PipelineStageBase.perform_reduce_grad`).
    """
    state: Any = fully_shard.state(root)  # type: ignore[attr-defined]
    state._root_post_backward_final_callback()


def _tensor_ids(module: nn.Module) -> set[int]:
    return {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
