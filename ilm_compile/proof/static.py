"""What can be told of a compiled program without running it, beside the types."""

from __future__ import annotations

from collections.abc import Callable

from ilm_compile.errors import ProgramError
from ilm_compile.passes.master_weights import is_master
from ilm_compile.program.parameter_map import model_variables
from ilm_compile.program.program import Program, Variable
from ilm_compile.program.users_line import defined_at

FACTS: dict[str, Callable[[Variable], object]] = {
    "shape": lambda variable: variable.user_shape,
    "dtype": lambda variable: variable.dtype,
    "requires_grad": lambda variable: variable.requires_grad,
    "further names": lambda variable: variable.aliases,
    "being a parameter": lambda variable: variable.is_parameter,
    "gradient hooks": lambda variable: [defined_at(h.function) for h in variable.gradient_hooks],
    "being saved": lambda variable: variable.persistent,
}


def check_variables(traced: Program, program: Program) -> None:
    """Raise `ProgramError` unless `program` has the inputs, outputs and variables of `traced`.

    A weight that was frozen must be, a tied one must keep its names: a graph computes the same
    without.
    """
    ours, theirs = (model_variables(p.parameter_maps, p.variables) for p in (program, traced))
    for name, variable in theirs.items():
        if name not in ours:
            _fail(name, "is gone", "its name and value are the model's")
        for what, fact in FACTS.items():
            if what == "dtype" and is_master(program, name, variable):
                continue
            if fact(ours[name]) != fact(variable):
                _fail(name, f"has {what} {fact(ours[name])}", f"the model has {fact(variable)}")
    for name, found in ours.items():
        if name not in theirs and found.is_parameter:
            _fail(name, "is new", "a parameter must come from the model's, by a parameter map")
    for what in ("inputs", "output_names"):
        if getattr(program, what) != getattr(traced, what):
            _fail(what, f"are {getattr(program, what)}", f"the model has {getattr(traced, what)}")
    ways, right = (
        {n: (str(c.graph.graph), c.weight) for n, c in p.target_counts.items()}
        for p in (program, traced)
    )
    for name in {**right, **ways}:
        if ways.get(name) != right.get(name):
            _fail(name, "is counted in another way", "what is counted is the model's")


def _fail(name: str, found: str, expected: str) -> None:
    raise ProgramError(f"variables: after the passes {name} {found}; {expected}")
