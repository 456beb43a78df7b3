"""plan="auto": the plans for this world, the fastest predicted first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch

from ilm_compile.errors import IlmCompileError, PlanError
from ilm_compile.planner import search
from ilm_compile.planner.candidate import DTYPES
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program

TRIES = 8  # plans that may not compile before it is given up
# What the search decides; a keyword of these narrows it, any other is taken as it is.
SEARCHED = (
    *("tp", "cp", "ep", "pp", "dp", "num_chunks", "num_microbatches", "schedule", "zero"),
    *("checkpoint", "sequence_parallel"),
)
PRECISIONS = {dtype: precision for precision, dtype in DTYPES.items()}
# The first whose words are all in the name that CUDA gives the device.
_DEVICES: dict[tuple[str, ...], str] = {
    ("GB200",): "gb200",
    ("B200",): "b200",
    ("H200",): "h200",
    ("H100",): "h100",
    ("A800",): "a800",
    ("A100", "40GB"): "a100-40g",
    ("A100",): "a100-80g",
}


Choice = TypeVar("Choice")


def first_compiled(
    choices: Iterable[Choice], compile_it: Callable[[Choice], Program]
) -> tuple[Choice, Program, list[tuple[Choice, str]]]:
    """Return the first of `choices` that compiles, its program, and those before with why not.

    Raises `PlanError` if none of the first `TRIES` does.
    """
    failed: list[tuple[Choice, str]] = []
    for choice in islice(choices, TRIES):
        try:
            return choice, compile_it(choice), failed
        except IlmCompileError as error:
            failed.append((choice, str(error).splitlines()[0]))
    raise PlanError(
        f"search: the {len(failed)} fastest plans do not compile; the first: {failed[0][1]}"
    )


def hardware_of(device: torch.device) -> str:
    """Return the row of the hardware table that `device` is. Raises `PlanError` for another."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device)
    for words, row in _DEVICES.items():
        if all(word in name for word in words):
            return row
    raise PlanError(
        f'plan="auto": the costs of {name} are not known; name the device that is most like it, as '
        'in hardware="h100"'
    )


def automatic_plans(
    traced: Program,
    given: Mapping[str, Any],
    *,
    world_size: int,
    device: torch.device,
    tokens_per_batch: int | None,
) -> Iterator[Plan]:
    """Yield the plans for `world_size` ranks whose micro-batch is that of `traced`.

    given: fields of the plan that the user has decided. tokens_per_batch: of one step of all ranks.
    The same on every rank. Raises `PlanError` if there is none.
    """
    rows, seq, *_ = *next(iter(traced.inputs.values())).shape, 1
    if tokens_per_batch is None:
        raise PlanError(
            'plan="auto" needs tokens_per_batch, the tokens of one step of all ranks; a micro-batch'
            f" of the example inputs has {rows} * {seq}"
        )
    wanted = {name: given[name] for name in SEARCHED if given.get(name) is not None}
    ask = partial(
        search,
        traced,
        world_size,
        given.get("hardware") or hardware_of(device),
        tokens_per_batch=tokens_per_batch,
        seq=seq,
        precision=PRECISIONS[given.get("dtype")],
    )
    found = ask(wanted={**wanted, "rows": rows})
    rest = {name: value for name, value in given.items() if name not in SEARCHED}
    count = 0
    for candidate in found.candidates:
        plan = found.plan_of(candidate)
        if all(getattr(plan, name) == value for name, value in wanted.items()):
            count += 1
            yield plan.replace(**{"kernels": Plan().kernels, **rest})
    if not count:
        found = ask()
        best = found.best  # says so if nothing fits
        asked = "".join(f", {name}={value}" for name, value in wanted.items())
        raise PlanError(
            f'plan="auto": none of {len(found.candidates)} plans for {world_size} ranks and '
            f"{tokens_per_batch} tokens a step has micro-batches of {rows} rows{asked}; the "
            f"fastest is {best.name}"
        )
