"""The exceptions a user of ilm_compile can meet. All derive from `IlmCompileError`.

A message says what was being done, what was expected, what was given, where (node, module path,
file:line) and what to do about it.
"""


class IlmCompileError(ValueError):
    """Base of every error that ilm_compile raises on purpose."""


class TraceError(IlmCompileError):
    """The model cannot be captured as one static graph."""


class PlanError(IlmCompileError):
    """The requested plan does not fit the model, the batch or the world size."""


class ProgramError(IlmCompileError):
    """A program breaks an invariant of the IR: a pass left it in a wrong state."""


class PlacementError(ProgramError):
    """The placements of a node do not follow from its inputs by the sharding rules."""


class ScheduleError(IlmCompileError):
    """A pipeline schedule is incomplete, out of order or can deadlock."""


class VerificationError(IlmCompileError):
    """A compiled program does not train the model it was compiled from."""


class BatchError(IlmCompileError):
    """A batch does not have the shapes or dtypes the program was compiled for."""


class NoTargetsError(BatchError):
    """A global batch has no target at all: its loss is 0/0."""
