"""The pass manager: orders passes by what they need, runs them, and checks what they wrote."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from ilm_compile.errors import PlanError, ProgramError
from ilm_compile.passes.base import Pass
from ilm_compile.passes.text import pass_types
from ilm_compile.program.check import check_structure
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.program import Program
from ilm_compile.program.traffic import traffic
from ilm_compile.sharding.check import check_placements


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did: its time, the nodes it `added` to and `removed` from the graph.

    `communication_before` and `communication_after` are the bytes that each rank sends per
    micro-batch, forward and backward. `str` gives it as one line.
    """

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    communication_before: float
    communication_after: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.seconds * 1e3:.1f} ms, {self.nodes_before} -> {self.nodes_after} "
            f"nodes (+{len(self.added)}, -{len(self.removed)}), {self.communication_before:,.0f} "
            f"-> {self.communication_after:,.0f} bytes sent per micro-batch"
        )


def communication_bytes(program: Program) -> float:
    """Return the bytes that each rank sends per micro-batch, forward and backward."""
    gradients = gradient_nodes(program.graph)
    return sum(
        message.num_bytes
        for node in program.calls()
        for message in traffic(node, program.plan.axes, has_gradient=node in gradients)
    )


def check_program(program: Program) -> None:
    """Run every check that applies: of structure always, of placements once there are any."""
    check_structure(program)
    if "sharded" in program.facts:
        check_placements(program)


# Checks a pass: entered with the pass and its input, left when the program is its output.
Validator = Callable[[Pass, Program], AbstractContextManager[None]]


@contextmanager
def validate_types(step: Pass, program: Program) -> Iterator[None]:
    """Check the structure and the placements of what the pass makes."""
    yield
    check_program(program)


def _validate_nothing(step: Pass, program: Program) -> AbstractContextManager[None]:
    return nullcontext()


# "numerics" is added by `ilm_compile.proof.translation`, which knows how to run programs.
VALIDATORS: dict[str | None, Validator] = {"types": validate_types, None: _validate_nothing}


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    disable: Collection[str] = (),
    callback: Callable[[PassReport], None] | None = None,
    validate: str | Validator | None = "types",
) -> None:
    """Run `passes` on `program`, in the order that their requirements give.

    `disable` names passes to leave out. `validate` says what is checked after each: "types", the
    structure and the placements; "numerics", those and the pass's output against its input, by
    the tolerance that the pass declares; None, nothing; or a `Validator`. Calls `callback` after
    each pass and its check. Raises `PlanError` if a name is unknown, if no order satisfies all
    requirements, or if a pass refuses the program; `ProgramError` naming the pass if it fails or
    leaves a program that is not valid.
    """
    validator = _validator(validate)
    sent = communication_bytes(program)
    for step in order_passes(_enabled(passes, disable), program.facts):
        before = {node: node.name for node in program.graph.nodes}
        start = time.perf_counter()
        _run(step, program, validator)
        seconds = time.perf_counter() - start
        after = {node: node.name for node in program.graph.nodes}
        report = PassReport(
            name=step.name,
            seconds=seconds,
            nodes_before=len(before),
            nodes_after=len(after),
            added=tuple(name for node, name in after.items() if node not in before),
            removed=tuple(name for node, name in before.items() if node not in after),
            communication_before=sent,
            communication_after=(sent := communication_bytes(program)),
        )
        program.pass_log.append(
            f"{step.name}: {len(before)} -> {len(after)} nodes "
            f"(+{len(report.added)}, -{len(report.removed)})"
        )
        if callback is not None:
            callback(report)


def order_passes(passes: Sequence[Pass], facts: Set[str] = frozenset()) -> list[Pass]:
    """Return `passes` sorted so that each finds its requirements met, given `facts` at the start.

    Passes that do not depend on each other keep the order in which they were given. Raises
    `PlanError` for two passes of one name, a requirement nobody meets, one that comes too late, or
    a circle.
    """
    positions = {step.name: position for position, step in enumerate(passes)}
    if len(positions) < len(passes):
        names = sorted(step.name for step in passes)
        twice = sorted({name for name in names if names.count(name) > 1})
        raise PlanError(f"passes: expected each pass once, got {twice} twice; keep one of each")
    earlier: dict[str, list[str]] = {name: [] for name in positions}
    for step in passes:
        for fact in sorted(step.requires | step.after):
            providers = [other.name for other in passes if fact in other.ensures]
            if not providers and fact in step.requires - facts:
                raise PlanError(_unmet(step, fact))
            earlier[step.name] += (name for name in providers if name != step.name)
        if late := sorted(step.before & facts):
            raise PlanError(
                f"passes: {step.name} must run before {late}, which the program is already; give "
                "it to the same partition() or run_passes() as the pass that ensures it"
            )
        for other in passes:
            if step.before & other.ensures:
                earlier[other.name].append(step.name)
    order = TopologicalSorter(earlier)
    try:
        order.prepare()
    except CycleError as error:
        raise PlanError(
            f"passes: {' -> '.join(error.args[1])} need each other in a circle; "
            "remove one of these requirements"
        ) from None
    found: list[Pass] = []
    ready: list[int] = []
    while order.is_active():
        ready = sorted([*ready, *(positions[name] for name in order.get_ready())])
        found.append(passes[ready.pop(0)])
        order.done(found[-1].name)
    return found


def _enabled(passes: Sequence[Pass], disable: Collection[str]) -> list[Pass]:
    if isinstance(disable, str):
        raise PlanError(f"passes: disable must be a collection of names, got {disable!r}")
    names = [step.name for step in passes]
    if unknown := sorted(set(disable) - set(names)):
        raise PlanError(f"passes: cannot disable {unknown}; the passes of this plan are {names}")
    return [step for step in passes if step.name not in disable]


def _validator(validate: str | Validator | None) -> Validator:
    if callable(validate):
        return validate
    if validate not in VALIDATORS:
        known = [name for name in VALIDATORS if name is not None]
        raise PlanError(f"passes: validate must be one of {known} or None, got {validate!r}")
    return VALIDATORS[validate]


def _run(step: Pass, program: Program, validator: Validator) -> None:
    try:
        with validator(step, program):
            step.apply(program)
            program.finish()
            program.facts |= step.ensures
    except PlanError:
        raise  # the pass refuses what the user asked for, in words of its own
    except Exception as error:
        kind = type(error) if isinstance(error, ProgramError) else ProgramError
        raise kind(f"pass {step.name}: {type(error).__name__}: {error}") from error


def _unmet(step: Pass, fact: str) -> str:
    known = sorted({kind.__name__ for kind in pass_types() if fact in kind.ensures})
    hint = f"add {' or '.join(known)}" if known else "no known pass does; trace() the model first"
    return f"passes: {step.name} requires {fact!r}, which no pass of the list ensures; {hint}"
