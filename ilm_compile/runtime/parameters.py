"""Everything this rank holds, under the user's names, and the gradients that belong together.

A tied parameter lives on every stage that uses it. All copies start equal and get the same summed
gradient, so any optimizer keeps them equal. Two copies on one rank would give an optimizer the same
name twice: only the first, the leader, is public, and the others follow it before each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ilm_compile.program.communicator import Communicator
from ilm_compile.program.layout import WEIGHT_AXES
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.runtime.data_parallel import GradientSync, ShardedSync, replicated, shard, units
from ilm_compile.runtime.expert_storage import HAS_MESHES, warn_of_whole_experts
from ilm_compile.runtime.initial_values import InitialValues
from ilm_compile.runtime.low_weights import gather_low, lower, refresh
from ilm_compile.runtime.materialize import Binding, fill, finish, local_value, resolve
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.runtime.shard import Shard, stored_part
from ilm_compile.schedule import Schedule


class Parameters:
    """The shards of this rank by variable name. `syncs`: gradient syncs by stage, when dp > 1."""

    def __init__(
        self,
        lowered: LoweredProgram,
        schedule: Schedule,
        mesh: Mesh,
        values: InitialValues,
        binding: Binding,
    ) -> None:
        self._mesh = mesh
        whole = replicated(lowered.variables)
        variables = lowered.variables.items()
        experts = {name for name, v in variables if mesh.storage(v.layout) is mesh.experts}
        if mesh.experts.axis.size == 1 or not HAS_MESHES:
            whole |= experts
            if experts and mesh.experts.axis.size > 1 and mesh.rank == 0:
                warn_of_whole_experts(mesh.experts.axis.size)
        self.syncs: dict[int, GradientSync] = {}
        self.shards: dict[str, Shard] = {}
        self._followers: dict[str, list[Shard]] = {}
        self._lowered: list[Shard] = []  # whose leaf is a copy in the dtype to compute in
        for stage in lowered.stages:
            if schedule.stage_to_rank[stage.index] != mesh.pp.rank:
                continue
            for unit in units(stage):
                fill(stage, unit.names, lowered.variables, values, mesh)
                if mesh.fsdp.size > 1 and mesh.dense.mesh is not None:
                    shard(
                        unit.module,
                        mesh.dense.mesh["dp"],
                        zero=lowered.plan.zero,
                        whole=[resolve(stage, name) for name in unit.names if name in whole],
                        experts={
                            resolve(stage, name): stored_part(lowered.variables[name], mesh).dim
                            for name in unit.names
                            if name in experts - whole
                        },
                        expert_mesh=mesh.experts.mesh and mesh.experts.mesh["dp"],
                    )
                    low = {n: stage.read_as[n] for n in unit.names if n in stage.read_as}
                    gather_low(unit.module, stage, low)
            finish(stage, binding)
            if mesh.fsdp.size > 1 and mesh.dense.mesh is not None:
                self.syncs[stage.index] = ShardedSync(stage.module, zero=lowered.plan.zero)
            for name in stage.variables:
                leaf = resolve(stage, name)
                own = Shard.of(lowered.variables[name], stage.index, leaf, mesh)
                if name in stage.read_as and not own.is_dp_sharded:
                    own = replace(own, leaf=lower(stage, name, stage.read_as[name]))
                    self._lowered.append(own)
                if name in self.shards:
                    self._followers.setdefault(name, []).append(own)
                else:
                    self.shards[name] = own
        self.ranks = {
            name: tuple(sorted({schedule.stage_to_rank[s] for s in lowered.owners(name)})) or (0,)
            for name in lowered.variables
        }
        self._keep_unused(lowered, values)
        # In the order of the user's model, which is also the same on every rank.
        self.shards = {n: self.shards[n] for n in lowered.variables if n in self.shards}
        self._tied_groups = self._make_tied_groups(lowered)
        self._dp: dict[str, Communicator] = {}  # whose gradients are added up here
        for own in self.parameters():
            ranks = mesh.data_parallel(own.variable.layout)
            if not own.is_dp_sharded and ranks.size > 1:
                self._dp[own.variable.name] = ranks

    def parameters(self) -> Iterator[Shard]:
        """The shards that are parameters, one per name."""
        return (shard for shard in self.shards.values() if shard.variable.is_parameter)

    def counts(self, shard: Shard) -> bool:
        """Whether this rank's part of `shard` counts in a sum over all ranks.

        Of equal parts only one counts: that of tp rank 0 where tp does not cut the parameter, of
        the first that share its storage where that is not cut, and of the first pipeline rank that
        holds it.
        """
        return (
            self.ranks[shard.variable.name][0] == self._mesh.pp.rank
            and (shard.is_dp_sharded or self._mesh.storage(shard.variable.layout).axis.rank == 0)
            and not any(
                self._mesh.axes[axis].rank and not shard.variable.layout.on(axis).is_shard
                for axis in WEIGHT_AXES
            )
        )

    def follow(self) -> None:
        """Give the second copies on this rank, and those in another dtype, the trained values."""
        with torch.no_grad():
            for name, followers in self._followers.items():
                for follower in followers:
                    follower.local.copy_(self.shards[name].local)
        refresh((shard.leaf, shard.local) for shard in self._lowered)

    def collect_gradients(self, *, scale: float = 1.0) -> None:
        """Add what the backward left on the leaves to the public gradients, tied ones summed.

        The user's hooks see what is complete by then. scale: what all gradients are multiplied by.
        """
        for own in self.parameters():
            if not own.leaf.requires_grad:
                continue
            grad = own.take_gradient()
            for follower in self._followers.get(own.variable.name, []):
                grad = _sum(grad, follower.take_gradient())
            dp = self._dp.get(own.variable.name)
            if grad is not None and dp is not None:
                grad = dp.all_reduce(grad)
            if (group := self._tied_groups.get(own.variable.name)) is not None:
                grad = group.all_reduce(torch.zeros_like(own.local) if grad is None else grad)
            if grad is not None and not own.variable.gradient_hooks:
                own.add_gradient(grad, self._mesh)
            elif grad is not None:
                hooked = own.apply_hooks(grad, self._mesh, is_post=False, scale=scale)
                own.add_gradient(hooked, self._mesh)
                if (total := own.gradient()) is not None:
                    total.copy_(own.apply_hooks(total, self._mesh, is_post=True, scale=scale))

    def _keep_unused(self, lowered: LoweredProgram, values: InitialValues) -> None:
        """Hold what no stage uses on pipeline rank 0, so that a state dict is complete."""
        if self._mesh.pp.rank != 0:
            return
        for name, variable in lowered.variables.items():
            if not lowered.owners(name) and (variable.is_parameter or variable.persistent):
                leaf = local_value(variable, values, self._mesh)
                if variable.is_parameter:
                    leaf = torch.nn.Parameter(leaf, requires_grad=variable.requires_grad)
                self.shards[name] = Shard.of(variable, -1, leaf, self._mesh)

    def _make_tied_groups(self, lowered: LoweredProgram) -> dict[str, Communicator]:
        """The ranks over which the gradients of each tied parameter of this rank are summed."""
        tied = {
            name: ranks
            for name, ranks in self.ranks.items()
            if len(ranks) > 1 and lowered.variables[name].requires_grad
        }
        groups = {ranks: self._mesh.pipeline(ranks) for ranks in sorted(set(tied.values()))}
        return {name: group for name, r in tied.items() if (group := groups[r]) is not None}


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
