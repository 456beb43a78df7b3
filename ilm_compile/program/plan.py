"""The plan: everything that decides how a model is partitioned, as one frozen value.

The same plan, model and seed give the same training on every machine. A plan is JSON on disk, so it
can be edited, compared and reused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from ilm_compile.errors import PlanError
from ilm_compile.program.byte_sizes import read_bytes
from ilm_compile.program.layout import AXES, MeshAxis, Sizes
from ilm_compile.program.placement import I, Placement, S

AUTO, SELECTIVE = "auto", "selective"
DTYPES = (None, "bfloat16", "float16")
ATTENTION_WAYS = (None, "heads", "queries", "ring")
KERNELS = ("auto", "triton", "torch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a model is partitioned. Sizes are numbers of ranks; see the field comments."""

    tp: int = 1  # ranks that share every layer (tensor parallel)
    cp: int = 1  # ranks that share every sequence (context parallel)
    ep: int = 1  # ranks that share the tokens of a micro-batch and its experts (expert parallel)
    pp: int = 1  # ranks that hold consecutive layers (pipeline parallel)
    dp: int | None = None  # ranks that work on other rows; None: what is left of the world
    num_chunks: int = 1  # model chunks, that is stages, per pipeline rank
    num_microbatches: int = 1  # per data-parallel rank and optimizer step
    schedule: str = "1f1b"
    sequence_parallel: bool | None = None  # None: decided by cost
    # Gathers and scatters of tokens run beside the products next to them.
    async_tensor_parallel: bool = False
    cp_attention: str | None = None  # "heads", "queries" or "ring"; None: by cost
    embed_split_hidden: bool | None = None  # embedding sharded by hidden size; None: by cost
    dispatch: bool | None = (
        None  # rows are sent to their experts, or tokens gathered; None: by cost
    )
    constraints: tuple[tuple[str, str], ...] = ()  # parameter (or glob) to placement, "S(0)"
    passes: tuple[str, ...] = ()  # of the user, beside those of the plan: "soft-cap{cap=30.0}"
    disable: tuple[str, ...] = ()  # names of passes to leave out
    # Fraction of the blocks that recompute their activations; "selective": what is cheap of all;
    # "auto": as little as makes it fit.
    checkpoint: bool | float | str = False
    memory: str | int | None = None  # with checkpoint="auto": what a rank may fill, as "80GiB"
    dtype: str | None = None  # compute dtype of matmuls and attention; None: as the model is
    zero: int = 1  # 1: shard gradients and optimizer state over dp, 3: parameters too
    kernels: str = "auto"  # fused ops: "triton", "torch" (none); "auto": where CUDA and triton are
    compile: bool | str = False  # torch.compile of each region; True: by Inductor, or a backend
    hardware: str = "h100"  # whose costs decide between placements and between cuts
    seed: int = 1024  # of the initial weights, when the model is on the meta device

    def __post_init__(self) -> None:
        object.__setattr__(self, "constraints", _read_constraints(self.constraints))
        for name in ("passes", "disable"):
            object.__setattr__(self, name, _read_texts(name, getattr(self, name)))
        for name in ("tp", "cp", "ep", "pp", "num_chunks", "num_microbatches"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"plan: {name} must be a positive integer, got {value!r}")
        if self.dp is not None and (not isinstance(self.dp, int) or self.dp < 1):
            raise PlanError(f"plan: dp must be None or a positive integer, got {self.dp!r}")
        again = self.checkpoint
        is_fraction = isinstance(again, (bool, int, float)) and 0 <= float(again) <= 1
        if not is_fraction and again not in (AUTO, SELECTIVE):
            raise PlanError(
                "plan: checkpoint must be False, True, a fraction in [0, 1], "
                f'"selective" or "auto", got {again!r}'
            )
        if self.memory_bytes is not None and self.checkpoint != AUTO:
            raise PlanError(
                f'plan: memory={self.memory!r} is what checkpoint="auto" keeps to, got '
                f"checkpoint={self.checkpoint!r}; write both, or neither"
            )
        if self.dtype not in DTYPES:
            raise PlanError(f"plan: dtype must be one of {DTYPES}, got {self.dtype!r}")
        if self.kernels not in KERNELS:
            raise PlanError(f"plan: kernels must be one of {KERNELS}, got {self.kernels!r}")
        _check_backend(self.compile)
        if self.cp_attention not in ATTENTION_WAYS:
            raise PlanError(
                f"plan: cp_attention must be one of {ATTENTION_WAYS}, got {self.cp_attention!r}"
            )
        if self.cp_attention and self.cp == 1:
            raise PlanError(
                f"plan: cp_attention={self.cp_attention!r} needs cp > 1, got cp=1; it says how "
                "attention is divided over cp ranks"
            )
        _check_async(self)
        if self.zero not in (1, 3):
            raise PlanError(f"plan: zero must be 1 or 3, got {self.zero!r}")
        if self.num_chunks > 1 and self.pp == 1:
            raise PlanError(
                f"plan: num_chunks={self.num_chunks} needs pp > 1, got pp=1; model chunks "
                "interleave the stages of several pipeline ranks"
            )

    @property
    def axes(self) -> Sizes:
        """The mesh axes that graphs know: ranks by name, in the order in which they cut."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def mesh_axes(self) -> list[MeshAxis]:
        """Those of more than one rank."""
        return [MeshAxis.of(axis, self.axes) for axis, size in self.axes.items() if size > 1]

    def axis(self, name: str) -> MeshAxis:
        """One axis that graphs know."""
        return MeshAxis.of(name, self.axes)

    @property
    def memory_bytes(self) -> int | None:
        """What a rank may fill, None for what the hardware has."""
        return None if self.memory is None else read_bytes(self.memory, "plan: memory")

    @property
    def ranks_per_replica(self) -> int:
        """The ranks that hold one copy of the model and work on the same rows: pp ep cp tp."""
        return self.pp * prod(self.axes.values())

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages over all ranks."""
        return self.pp * self.num_chunks

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, source: str | Path) -> Plan:
        """Return the plan in JSON text or in a file. Raises `PlanError` for an unknown key."""
        text = str(source) if str(source).lstrip().startswith("{") else Path(source).read_text()
        return cls().replace(**json.loads(text))

    def replace(self, **changes: Any) -> Plan:
        """Return a copy with some fields changed. Raises `PlanError` for an unknown field."""
        known = [field.name for field in fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise PlanError(f"plan: unknown option {unknown}, known are {known}")
        return replace(self, **changes)


def _read_texts(name: str, given: Any) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given)
    if isinstance(given, str) or not all(isinstance(text, str) for text in texts):
        raise PlanError(f"plan: {name} must be a collection of texts, got {given!r}")
    return texts


def _check_async(plan: Plan) -> None:
    given = plan.async_tensor_parallel
    if not isinstance(given, bool):
        raise PlanError(f"plan: async_tensor_parallel must be True or False, got {given!r}")
    lack = "tp > 1, got tp=1" if plan.tp == 1 else ""
    if plan.sequence_parallel is False:
        lack = lack or "tokens that tp ranks share, got sequence_parallel=False"
    if given and lack:
        raise PlanError(
            f"plan: async_tensor_parallel=True needs {lack}; it runs the gathers and scatters of "
            "sequence parallelism beside the products next to them"
        )


def _check_backend(compile: Any) -> None:
    if isinstance(compile, bool):
        return
    if not isinstance(compile, str) or compile not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise PlanError(
            "plan: compile must be True, False or a backend of torch.compile "
            f"({known}), got {compile!r}"
        )


def _read_constraints(given: Any) -> tuple[tuple[str, str], ...]:
    """Return constraints as pairs of text.

    They may be a mapping, and the placements our own, their text, or torch.distributed.tensor's
    Shard and Replicate.
    """
    pairs = given.items() if isinstance(given, Mapping) else given
    return tuple((str(pattern), str(_placement(pattern, value))) for pattern, value in pairs)


def _placement(pattern: str, value: Any) -> Placement:
    kind = type(value).__name__
    if kind == "Shard":
        return S(value.dim)
    try:
        found = I if kind == "Replicate" else Placement.parse(str(value))
    except ValueError as error:
        raise PlanError(f"plan: constraint {pattern!r}: {error}") from None
    if found.kind not in "IS":
        raise PlanError(
            f"plan: constraint {pattern!r}: a parameter is I (replicated) or S(dim), got {found}"
        )
    return found
