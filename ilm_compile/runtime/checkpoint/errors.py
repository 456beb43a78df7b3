"""What goes wrong with checkpoints."""

from ilm_compile.errors import IlmCompileError


class CheckpointError(IlmCompileError):
    """A checkpoint cannot be written, is incomplete or damaged, or is of another model."""
