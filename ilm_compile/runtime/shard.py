"""One rank's part of one parameter or buffer, and the way back to the full tensor.

A parameter is cut along its placements on the axes of graphs, and what is left of it by those that
share its storage, "dp": along dimension 0, an expert's along the first that they divide. Its public
face is a DTensor over ("tp", "dp"), or ("tp", "ep", "dp") where ep cuts it, that shares memory with
what the stage computes with.
A dimension of several segments (a fused qkv) is cut segment by segment: the DTensor then shows the
layout in which each rank's part is contiguous, and `full` undoes the permutation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as DTensorShard

from ilm_compile.program.communicator import Communicator
from ilm_compile.program.kept_hooks import apply_hooks
from ilm_compile.program.layout import Layout
from ilm_compile.program.placement import join_shards
from ilm_compile.program.program import Variable
from ilm_compile.runtime.communicator import all_gather_single
from ilm_compile.runtime.mesh import Axis, Mesh

Axes = Mapping[str, Communicator]


@dataclass(frozen=True, slots=True)
class Shard:
    """What this rank holds of `variable` for one stage (-1: no stage uses it).

    leaf: the tensor the stage computes with, FSDP's own where dp shards it. local: its memory on
    this rank. public: what users and optimizers see.
    """

    variable: Variable
    stage: int
    leaf: Tensor
    local: Tensor
    public: Tensor

    @property
    def is_dp_sharded(self) -> bool:
        return isinstance(self.leaf, DTensor)

    @classmethod
    def of(cls, variable: Variable, stage: int, leaf: Tensor, mesh: Mesh) -> Shard:
        """The shard whose values the stage finds in `leaf`."""
        detached = leaf.detach()
        local = detached.to_local() if isinstance(detached, DTensor) else detached
        public = _public(local, variable, mesh, is_dp_sharded=isinstance(leaf, DTensor))
        if variable.is_parameter:
            public = nn.Parameter(public, requires_grad=leaf.requires_grad)
        return cls(variable, stage, leaf, local, public)

    def take_gradient(self) -> Tensor | None:
        """The local gradient that the backward left on the leaf, which has none afterwards."""
        grad, self.leaf.grad = self.leaf.grad, None
        return grad.to_local() if isinstance(grad, DTensor) else grad

    def gradient(self) -> Tensor | None:
        """This rank's part of the public gradient."""
        grad = self.public.grad
        return grad.to_local() if isinstance(grad, DTensor) else grad

    def add_gradient(self, grad: Tensor, mesh: Mesh) -> None:
        """Add a local gradient to the public one."""
        own = self.gradient()
        if own is not None:
            own.add_(grad)
        else:
            self.public.grad = _public(grad, self.variable, mesh, is_dp_sharded=self.is_dp_sharded)

    def full(self, local: Tensor, mesh: Mesh, axes: Axes) -> Tensor:
        """The full tensor of which ranks hold `local`: collective over those that hold a part."""
        axis = mesh.storage(self.variable.layout).axis
        if self.is_dp_sharded and axis.size > 1:
            local = _gather_stored(local, stored_part(self.variable, mesh), axis)
        return gather(local, self.variable.layout, axes)

    def load(self, full: Tensor, mesh: Mesh) -> None:
        """Overwrite this rank's part by its slice of `full`."""
        with torch.no_grad():
            self.local.copy_(self._own_part(full, mesh))

    def apply_hooks(self, grad: Tensor, mesh: Mesh, *, is_post: bool, scale: float) -> Tensor:
        """What the user's hooks make of the local gradient of the whole batch.

        Local: each hook works element by element. It sees a tensor of the user's shape.
        """
        hooks = [h for h in self.variable.gradient_hooks if h.is_post == is_post]
        if not hooks:
            return grad
        whole = self.variable.unpad(self._alone(grad, mesh))
        value = self.variable.unpad(self._alone(self.local, mesh)) if is_post else whole
        result = apply_hooks(hooks, whole, value, scale=scale)
        # torch's fused AdamW reads a gradient in the order of its weight, whatever its strides.
        return self._own_part(self.variable.pad(result), mesh).contiguous()

    def _own_part(self, full: Tensor, mesh: Mesh) -> Tensor:
        """This rank's slice of a full tensor."""
        part = self.variable.layout.cut(full, mesh.place)
        if self.is_dp_sharded:
            part = stored_part(self.variable, mesh).of(part)
        return part

    def _alone(self, local: Tensor, mesh: Mesh) -> Tensor:
        """A full tensor with this rank's part and zeros for the others."""
        part = local
        if self.is_dp_sharded:
            stored = stored_part(self.variable, mesh)
            part = local.new_zeros(stored.shape)
            stored.of(part).copy_(local)
        return self.variable.layout.alone(part, mesh.place).clone()


def gather(local: Tensor, layout: Layout, axes: Axes) -> Tensor:
    """The full value of a tensor with this layout, by the communicators of `axes`.

    Collective over the axes that cut it, or on which it is partial; what was cut last is joined
    first. Of a parameter's placement R, which speaks of its gradient, nothing is to be gathered.
    """
    for axis, placement in reversed(layout.placed):
        ranks = axes[axis]
        if placement.kind == "P":
            local = ranks.all_reduce(local)
        elif placement.is_shard and ranks.size > 1:
            local = join_shards(ranks.all_gather(local).unbind(0), placement)
    return local


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Where FSDP cuts what the other axes leave of a parameter, of this shape.

    This rank has `size` of dimension `dim`, from `start`: as `Tensor.chunk` cuts, only the last
    ranks have less, if anything.
    """

    shape: tuple[int, ...]
    dim: int
    start: int
    size: int

    def of(self, tensor: Tensor) -> Tensor:
        """The view of a tensor of `shape` that this rank has."""
        return tensor.narrow(self.dim, self.start, self.size)


def stored_part(variable: Variable, mesh: Mesh) -> StoredPart:
    """What FSDP leaves this rank of `variable`.

    Of experts, a rank has few: where those that share them do not divide them, each is cut.
    """
    storage = mesh.storage(variable.layout)
    shape = variable.layout.local_shape(variable.shape, mesh.place.sizes)
    rank, size, dim = storage.axis.rank, storage.axis.size, 0
    if storage is mesh.experts:
        dim = next((d for d, length in enumerate(shape) if length % size == 0), 0)
    chunk = -(-shape[dim] // size)
    start = min(chunk * rank, shape[dim])
    return StoredPart(shape, dim, start, min(chunk, shape[dim] - start))


def _gather_stored(local: Tensor, part: StoredPart, axis: Axis) -> Tensor:
    """Undo FSDP's cut."""
    length = part.shape[part.dim]
    front = local.movedim(part.dim, 0)
    padded = front.new_zeros((-(-length // axis.size), *front.shape[1:]))
    padded[: part.size] = front
    stacked = padded.new_empty((axis.size * padded.shape[0], *padded.shape[1:]))
    all_gather_single(stacked, padded, group=axis.group)
    return stacked[:length].movedim(0, part.dim)


def _public(local: Tensor, variable: Variable, mesh: Mesh, *, is_dp_sharded: bool) -> Tensor:
    device_mesh = mesh.storage(variable.layout).mesh
    if device_mesh is None:
        return local
    *axes, _ = device_mesh.mesh_dim_names or ()
    placements = [variable.layout.on(axis) for axis in axes]
    return DTensor.from_local(
        local,
        device_mesh,
        (
            *(DTensorShard(p.dim) if p.is_shard else Replicate() for p in placements),
            DTensorShard(stored_part(variable, mesh).dim) if is_dp_sharded else Replicate(),
        ),
        run_check=False,
        shape=torch.Size(variable.shape),
        stride=torch.empty(variable.shape, device="meta").stride(),
    )
