"""What `lower` makes of a program: one module per pipeline stage, and what passes between them.

This is the whole interface between the compiler and the runtime: the runtime needs nothing else,
and anything that fills these fields can be run by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ilm_compile.program.layout import Layout
from ilm_compile.program.parameter_map import ParameterMap
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Count, Input, Lookup, Variable


@dataclass(frozen=True, slots=True)
class Boundary:
    """A value that one stage sends to the next, for each micro-batch; shapes are rank-local."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage.

    ``module(*batch_inputs, *received)`` returns the tuple ``sent``, or on the last stage the tuple
    ``outputs``, whose first entry is the loss. Its children are the regions, in order. `variables`
    maps the user's name of each parameter and buffer used here to its attribute path in `module`;
    the tensors are rank-local and on the meta device until the runtime materialises them.
    `read_as` gives the dtype of those parameters that the module casts to it wherever it uses them:
    it may be given them in that dtype instead.
    """

    index: int
    module: nn.Module
    batch_inputs: tuple[str, ...]
    received: tuple[Boundary, ...]
    sent: tuple[Boundary, ...]
    outputs: tuple[str, ...]
    variables: dict[str, str]
    read_as: dict[str, torch.dtype] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoweredProgram:
    """A program ready to run; the schedule says on which pipeline rank each stage runs."""

    plan: Plan
    inputs: dict[str, Input]
    variables: dict[str, Variable]
    target_counts: dict[str, Count]
    stages: tuple[Stage, ...]
    output_layouts: tuple[Layout, ...]  # of the last stage's outputs
    output_widths: dict[str, int]  # as in `Program`
    parameter_maps: tuple[ParameterMap, ...] = ()  # likewise
    lookups: tuple[Lookup, ...] = ()  # likewise

    def owners(self, name: str) -> tuple[int, ...]:
        """Return the stages that hold variable `name`; a tied parameter may have several."""
        return tuple(stage.index for stage in self.stages if name in stage.variables)
