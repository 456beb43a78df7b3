"""Which ranks do what together: the process mesh of a plan, and this process's place in it.

Ranks are laid out with tp fastest, then cp, ep, dp, and pp outermost: the ranks of a tp group are
neighbours on one node, and pipeline stages, which exchange least, lie furthest apart.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ilm_compile.errors import PlanError
from ilm_compile.program.communicator import Communicator
from ilm_compile.program.layout import AXES, EXPERT_AXIS, WEIGHT_AXES, Layout, Place
from ilm_compile.program.plan import Plan
from ilm_compile.runtime.alike import differences
from ilm_compile.runtime.communicator import MeasuredCommunicator, communicator_over
from ilm_compile.runtime.groups import group_of_all, own_group
from ilm_compile.runtime.guard.activity import ACTIVITY
from ilm_compile.runtime.meeting import meet, warn_of_restarts

TIMEOUT_VARIABLE = "ILM_COMPILE_TIMEOUT_S"
DEFAULT_TIMEOUT_S = "300"
RANK_ORDER = ("pp", "dp", "ep", "cp", "tp")  # of the coordinates of a rank, the last the fastest


@dataclass(frozen=True, slots=True)
class Axis:
    """This process's place on one mesh axis; without torch.distributed there is no group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class Storage:
    """The ranks that share the storage of a parameter, and whose gradients of it are added up.

    mesh: of its DTensor, over the ranks of this pipeline rank: a dim for each axis of graphs that
    can cut it, and the last, "dp", for `axis`, which cuts what they leave. None without
    torch.distributed.
    """

    axis: Axis
    mesh: DeviceMesh | None = None


@dataclass(frozen=True, slots=True)
class Mesh:
    """The axes of a run, seen from this process.

    dp: the ranks that work on other rows. dense: who shares a parameter that every token passes:
    dp, ep and cp together. experts: who shares one that ep cuts, dp and cp. device_mesh has the
    dims of RANK_ORDER.
    timeout: after which a collective that a rank does not join becomes an error. group: all ranks.
    """

    pp: Axis
    dp: Axis
    ep: Axis
    cp: Axis
    tp: Axis
    dense: Storage
    experts: Storage
    device: torch.device
    timeout: timedelta = timedelta(seconds=float(DEFAULT_TIMEOUT_S))
    group: dist.ProcessGroup | None = None
    device_mesh: DeviceMesh | None = None

    @property
    def fsdp(self) -> Axis:
        """The ranks whose gradients are added up, but those of experts."""
        return self.dense.axis

    def storage(self, layout: Layout) -> Storage:
        """Who shares a parameter of this layout."""
        is_cut = self.ep.size > 1 and layout.on(EXPERT_AXIS).is_shard
        return self.experts if is_cut else self.dense

    @property
    def world_size(self) -> int:
        return self.pp.size * self.fsdp.size * self.tp.size

    @property
    def rank(self) -> int:
        """The global rank."""
        return self.rank_at(self.pp.rank, self.fsdp.rank, self.tp.rank)

    @property
    def is_distributed(self) -> bool:
        """Whether there is a process group, even if only of one process."""
        return self.group is not None

    @property
    def everyone(self) -> Communicator:
        """All ranks of the job."""
        return communicator_over(self.group)

    @property
    def axes(self) -> dict[str, Axis]:
        """The axes that graphs know, by name, in the order in which they cut."""
        return {name: getattr(self, name) for name in AXES}

    @property
    def place(self) -> Place:
        """This rank's place on them."""
        axes = self.axes.items()
        return Place({name: a.size for name, a in axes}, {name: a.rank for name, a in axes})

    @property
    def speaks(self) -> bool:
        """Whether of the ranks that compute on the same rows this is the first."""
        return not any(axis.rank for axis in self.axes.values())

    @property
    def is_first_replica(self) -> bool:
        """Whether of the ranks that hold a stage this is the one that speaks for all."""
        return self.fsdp.rank == 0 and self.tp.rank == 0

    def graph_communicators(self) -> dict[str, MeasuredCommunicator]:
        """What graphs reach the other ranks of each axis by."""
        return {name: communicator_over(axis.group) for name, axis in self.axes.items()}

    def data_parallel(self, layout: Layout) -> Communicator:
        """The ranks whose gradients of a parameter of this layout are added up."""
        return communicator_over(self.storage(layout).axis.group)

    def pipeline(self, pp_ranks: tuple[int, ...]) -> Communicator | None:
        """The given pipeline ranks at this rank's (fsdp, tp): see `pipeline_group`."""
        group = self.pipeline_group(pp_ranks)
        return None if group is None else communicator_over(group)

    def rank_at(self, pp: int, fsdp: int, tp: int) -> int:
        """The global rank at these coordinates; fsdp counts (dp, ep, cp), cp fastest."""
        return (pp * self.fsdp.size + fsdp) * self.tp.size + tp

    def replicas(self) -> list[list[int]]:
        """The global ranks of each data-parallel rank, which work on the same rows."""
        each = self.ep.size * self.cp.size
        return [
            [
                self.rank_at(pp, dp * each + number, tp)
                for pp in range(self.pp.size)
                for number in range(each)
                for tp in range(self.tp.size)
            ]
            for dp in range(self.dp.size)
        ]

    @classmethod
    def create(
        cls,
        plan: Plan,
        *,
        device: torch.device | str | None = None,
        timeout: timedelta | None = None,
    ) -> Self:
        """Lay the processes of this job out for `plan`, joining the process group if need be.

        dp takes the ranks that the other axes leave. device: this rank's GPU if there is one and
        the process group is not gloo, else the CPU. timeout: 5 minutes unless the environment
        variable ILM_COMPILE_TIMEOUT_S says otherwise. Raises `PlanError` if the world does not fit.
        """
        if timeout is None:
            seconds = os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S)
            timeout = timedelta(seconds=float(seconds))
        started = _is_started()
        plan = fit_world(plan)
        world_size = plan.ranks_per_replica * (plan.dp or 1)
        place = choose_device(device)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        if not started:
            axes: dict[str, Any] = dict.fromkeys(RANK_ORDER, Axis())
            stored: dict[str, Any] = {"dense": Storage(Axis()), "experts": Storage(Axis())}
            return cls(**axes, **stored, device=place, timeout=timeout)
        everyone: dist.ProcessGroup | None
        if dist.is_initialized():
            warn_of_restarts()
            everyone = group_of_all(timeout)  # the default group keeps its own timeout
        else:
            join_job(place, timeout=timeout)
            everyone = dist.group.WORLD
        _check_alike({f.name: repr(getattr(plan, f.name)) for f in fields(plan)}, place)
        layout = torch.arange(world_size).view(plan.pp, -1, plan.ep, plan.cp, plan.tp)
        axes = {name: _axis(layout, dim, timeout, place) for dim, name in enumerate(RANK_ORDER)}
        dense = layout.flatten(1, 3)
        experts = layout.transpose(1, 2).flatten(2, 3)  # pp, ep, dp and cp, tp
        own = axes["pp"].rank
        weights = {name: axes[name] for name in WEIGHT_AXES}
        return cls(
            **axes,
            dense=_storage(
                weights | {"dp": _axis(dense, 1, timeout, place)},
                dense[own].permute(1, 0),
                place,
            ),
            experts=_storage(
                weights | {EXPERT_AXIS: axes[EXPERT_AXIS], "dp": _axis(experts, 2, timeout, place)},
                experts[own].permute(2, 0, 1),
                place,
            ),
            device=place,
            timeout=timeout,
            group=everyone,
            device_mesh=_device_mesh(axes, layout, place),
        )

    def check_alike(self, facts: Mapping[str, str]) -> None:
        """Raise `PlanError` on all ranks unless all have the same `facts`, by name. Collective."""
        if self.is_distributed:
            _check_alike(facts, self.device)

    def pipeline_group(self, pp_ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """The group of the given pipeline ranks at this rank's (fsdp, tp), None if not a member.

        Every rank of the job must call this in the same order with the same argument.
        """
        others = [rank for rank in range(self.pp.size) if rank not in pp_ranks]
        lines = [
            [self.rank_at(pp, fsdp, tp) for pp in part]
            for part in (pp_ranks, others)
            for fsdp in range(self.fsdp.size)
            for tp in range(self.tp.size)
            if part
        ]
        group = own_group(lines, self.timeout, self.device)
        return group if self.pp.rank in pp_ranks else None


def join_job(
    device: torch.device, *, timeout: timedelta, on_met: Callable[[], object] | None = None
) -> None:
    """Make the process group of all ranks, NCCL on a GPU and gloo on a CPU; left at a normal exit.

    For what ranks must tell each other before `Mesh.create`, which joins by itself if need be.
    Ranks that torchrun started again meet each other only. on_met: called when all have come,
    before they connect. Raises `PlanError` naming the ranks that do not come within `timeout`, or
    what is wrong with the host to meet at.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    ACTIVITY.do("meet the other ranks")
    store = meet(timeout)
    if on_met is not None:
        on_met()
    ACTIVITY.do("connect to the other ranks")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=_world_size(),
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    atexit.register(_leave)


def _leave() -> None:
    """Leave the process group at a normal exit: torn down with the interpreter, gloo may abort.

    After an exception it is left as it is, since leaving could wait for ranks that are gone.
    """
    failed = getattr(sys, "last_value", None) is not None
    if dist.is_initialized() and not failed:
        dist.destroy_process_group()


def _check_alike(facts: Mapping[str, str], device: torch.device) -> None:
    if found := differences({name: text.encode() for name, text in facts.items()}, device):
        raise PlanError(
            f"parallelize: expected the same plan and program on every rank, {'; '.join(found)}; "
            "call it with the same model and options everywhere"
        )


def _axis(layout: torch.Tensor, dim: int, timeout: timedelta, device: torch.device) -> Axis:
    """This rank's place on dimension `dim` of `layout`.

    The groups are made here and not by `init_device_mesh`, which leaves them torch's own timeout
    of 10 or 30 minutes and makes a group for each dimension of size 1; here these share one.
    """
    lines = layout.movedim(dim, -1).reshape(-1, layout.shape[dim]).tolist()
    group = own_group(lines, timeout, device)
    return Axis(group.rank(), group.size(), group)


def _storage(axes: Mapping[str, Axis], layout: torch.Tensor, device: torch.device) -> Storage:
    """The ranks of the last of `axes`; `layout` has the global ranks of all, a dim for each."""
    return Storage(axes["dp"], _device_mesh(axes, layout, device))


def _device_mesh(
    axes: Mapping[str, Axis], layout: torch.Tensor, device: torch.device
) -> DeviceMesh:
    groups = [axis.group for axis in axes.values() if axis.group is not None]
    return DeviceMesh.from_group(
        groups, device.type, mesh=layout.contiguous(), mesh_dim_names=tuple(axes)
    )


def _is_started() -> bool:
    return dist.is_initialized() or "WORLD_SIZE" in os.environ


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def fit_world(plan: Plan) -> Plan:
    """Return `plan` with the number of data-parallel ranks that the processes of this job leave.

    Makes no process group. Raises `PlanError` if the world does not fit.
    """
    started, ranks = _is_started(), world_size()
    needed = plan.ranks_per_replica * (plan.dp or 1)
    sizes = {"tp": plan.tp, "pp": plan.pp, **plan.axes, "dp": plan.dp or 1}
    shown = {name: size for name, size in sizes.items() if size > 1 or name in ("tp", "pp")}
    if not started and needed > 1:
        given = ", ".join(f"{name}={size}" for name, size in shown.items())
        raise PlanError(
            f"parallelize with {given} needs {needed} processes and must be "
            f"started by torchrun: torchrun --nproc-per-node={needed} script.py"
        )
    if ranks % needed or (plan.dp and ranks != needed):
        fitting = needed if plan.dp else -(-ranks // needed) * needed
        rule = "parallelize: expected a world size that is a multiple of "
        raise PlanError(
            f"{rule.replace('that is a multiple ', '') if plan.dp else rule}{'*'.join(shown)} = "
            f"{'*'.join(map(str, shown.values()))} = {needed}, got {ranks} processes; "
            f"start it with torchrun --nproc-per-node={fitting} script.py"
        )
    return plan.replace(dp=ranks // plan.ranks_per_replica)


def world_size() -> int:
    """The processes of this job, whether they have met or not."""
    return dist.get_world_size() if dist.is_initialized() else _world_size()


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """This rank's GPU if there is one and the process group is not gloo, else the CPU.

    Raises `PlanError` if there are more local ranks than GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device is None:
        has_gloo = dist.is_initialized() and "nccl" not in dist.get_backend()
        device = "cpu" if has_gloo or not torch.cuda.is_available() else "cuda"
    chosen = torch.device(device)
    if chosen.type != "cuda" or chosen.index is not None:
        return chosen
    if local_rank >= torch.cuda.device_count():
        raise PlanError(
            f"parallelize: local rank {local_rank} needs a GPU of its own, found "
            f"{torch.cuda.device_count()}; start fewer processes per node or pass device='cpu'"
        )
    return torch.device("cuda", local_rank)
