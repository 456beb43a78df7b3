"""Pipeline split: the graph divided into stages of equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np
from torch import fx

from ilm_compile.cost import hardware_named
from ilm_compile.errors import PlanError
from ilm_compile.passes.base import Pass, check_hardware
from ilm_compile.program.program import Program
from ilm_compile.rewrite.balance import balance
from ilm_compile.rewrite.cut_points import crossing_bytes, cut_points
from ilm_compile.rewrite.cuts_like import cuts_like
from ilm_compile.rewrite.node_cost import step_seconds
from ilm_compile.rewrite.parameter_free import parameter_free_nodes


@dataclass(frozen=True, kw_only=True)
class PipelineSplit(Pass):
    """Give every node a pipeline stage, so that the slowest stage is as fast as it can be.

    Costs are the seconds that forward, backward and recompute of each node take on `hardware` (a
    name that `hardware_named` knows), embedding and head included; layers are not counted. Nodes
    that no parameter reaches (rotary tables, masks) become clones: ``meta["clone"]`` is set instead
    of ``meta["stage"]``, and each stage that uses them computes them for itself. Stages are
    consecutive runs of the graph, and stage s sends to stage s + 1 only. like: a program of the
    same model on another batch shape, already split, so that each stage holds the same parameters.
    Preserves numerics bit for bit.
    """

    name: ClassVar[str] = "pipeline-split"
    after: ClassVar[frozenset[str]] = frozenset({"sharded", "cast", "checkpointed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"split"})

    num_stages: int
    hardware: str = "h100"
    like: Program | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_stages < 1:
            raise PlanError(f"{self.name}: num_stages must be positive, got {self.num_stages}")
        check_hardware(self.name, self.hardware)

    def apply(self, program: Program) -> None:
        clones = parameter_free_nodes(program)
        for node in clones:
            node.meta["clone"] = True
        calls = [node for node in program.calls() if node not in clones]
        seconds = self._seconds(program, calls)
        if self.like is None:
            cuts = self.choose_cuts(program, calls, seconds)
        else:
            cuts = cuts_like(self.like, calls, self.num_stages)
        starts = [0, *cuts, len(calls)]
        for stage in range(self.num_stages):
            for node in calls[starts[stage] : starts[stage + 1]]:
                node.meta["stage"] = stage
        self._explain(program, calls, seconds, starts, len(clones))

    def choose_cuts(
        self, program: Program, calls: Sequence[fx.Node], seconds: list[float]
    ) -> list[int]:
        """Return the positions in `calls` at which the 2nd, 3rd, ... stage begins.

        seconds: of each call; what is chosen may change them.
        """
        edges = [0, *self.candidates(program, calls, seconds)]
        units = np.add.reduceat(seconds, edges).tolist() if seconds else []
        return [edges[unit] for unit in balance(units, self.num_stages)]

    def candidates(
        self, program: Program, calls: Sequence[fx.Node], seconds: Sequence[float]
    ) -> list[int]:
        """Return where a stage may begin. Raises `PlanError` if there are too few places."""
        candidates = cut_points(program, calls, seconds)
        if self.num_stages > len(candidates) + 1:
            raise PlanError(
                f"{self.name}: pp * num_chunks = {self.num_stages} stages need "
                f"{self.num_stages - 1} cuts, but the model has {len(candidates)} cut points "
                "(places that only the residual stream crosses); use at most "
                f"{len(candidates) + 1} stages, or a deeper model"
            )
        return candidates

    def _seconds(self, program: Program, calls: Sequence[fx.Node]) -> list[float]:
        cost = step_seconds(program, hardware_named(self.hardware))
        return [cost[node] for node in calls]

    def _explain(
        self,
        program: Program,
        calls: Sequence[fx.Node],
        seconds: Sequence[float],
        starts: Sequence[int],
        num_clones: int,
    ) -> None:
        crossing = [*crossing_bytes(calls), 0]
        total = sum(seconds)
        for stage, (start, end) in enumerate(pairwise(starts)):
            names = [program.regions[calls[p].meta["region"]].name for p in (start, end - 1)]
            runs = " to ".join(dict.fromkeys(names))
            sent = f", sends {crossing[end]:,.0f} bytes per micro-batch" if end < len(calls) else ""
            program.decisions.append(
                f"{self.name}: stage {stage} runs {runs}, "
                f"{sum(seconds[start:end]) / total:.1%} of the cost{sent}"
            )
        if self.num_stages > 1:
            program.decisions.append(
                f"{self.name}: {num_clones} nodes that no parameter reaches are computed in each "
                "stage that uses them, never sent"
            )
        _explain_shared(program)


def _explain_shared(program: Program) -> None:
    """Report the parameters that several stages hold, and those that none does."""
    stages: dict[str, set[int]] = {name: set() for name in program.parameters()}
    for node in program.graph.find_nodes(op="get_attr"):
        if node.target in stages:
            stages[str(node.target)] |= {u.meta["stage"] for u in node.users if "stage" in u.meta}
    for name, holders in stages.items():
        if len(holders) > 1:
            aliases = ", ".join(program.variables[name].aliases) or "used more than once"
            program.decisions.append(
                f"{PipelineSplit.name}: {name} ({aliases}) is shared by stages "
                f"{', '.join(map(str, sorted(holders)))}; its gradients are added up"
            )
        if not holders:
            program.warnings.append(
                f"{PipelineSplit.name}: parameter {name} takes no part in the loss, so no stage "
                "holds it and it is not trained"
            )
