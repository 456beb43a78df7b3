"""Checkpoints: saved under one plan, resumed under any other; safetensors and JSON, no pickle.

A checkpoint is a folder ``step-00000010`` with the tensors that each rank held, as
``rank-00003-000.safetensors``, what is in these, as ``part-00003.json``, and ``manifest.json``,
written last. `CheckpointManager` writes, finds, checks and loads them.
"""

from ilm_compile.runtime.checkpoint.errors import CheckpointError as CheckpointError
from ilm_compile.runtime.checkpoint.manager import CheckpointManager as CheckpointManager
