"""What a pass is: one named rewrite of a `Program`, with its options and its promises.

To write your own, subclass `Pass` as a frozen dataclass, say in the class variables what must be
true before and what is true after, and change the program in `apply`. `activation_checkpoint.py` is
the shortest example. The pass manager orders passes, times them and checks the program after each,
so a pass does not log, does not time itself and does not check what it wrote.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, Literal

from ilm_compile.cost import hardware_named
from ilm_compile.errors import PlanError
from ilm_compile.program.program import Program


def check_hardware(name: str, hardware: str) -> None:
    """Raise `PlanError`, of the pass of this name, unless the costs of `hardware` are known."""
    try:
        hardware_named(hardware)
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """Base of all passes. Options are fields, validated in ``__post_init__`` (`PlanError`).

    `requires` are facts that must hold before (see ``Program.facts``), `ensures` those that hold
    after. `after` names facts whose pass must have run first if it runs at all, `before` facts
    whose pass must not have run yet (``{"sharded"}``: the pass works on the unsharded program, and
    the search for placements sees what it wrote). `numerics` says
    whether the program still computes the same: "preserving" up to the relative `tolerance` (0.0:
    bit for bit), or "changing", and then `tolerance` is what to expect.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    after: ClassVar[frozenset[str]] = frozenset()
    before: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Literal["preserving", "changing"]] = "preserving"
    tolerance: ClassVar[float] = 0.0

    def __str__(self) -> str:
        """The pass as a plan has it: its name, and the options that are not the default."""
        options = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.default is MISSING or getattr(self, f.name) != f.default
        }
        written = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{self.name}{{{written}}}" if written else self.name

    @abstractmethod
    def apply(self, program: Program) -> None:
        """Rewrite `program` in place.

        Say what was done and why in ``program.decisions``, and what the user should know of in
        ``program.warnings``, as sentences that begin with the name of the pass.
        """
