"""The config of this process, which InternEvo's functions find by themselves."""

from __future__ import annotations

from ilm_compile.config import Config
from ilm_compile.errors import IlmCompileError

_CONFIGS: list[Config] = []  # none, or the one


def set_config(config: Config) -> None:
    """Make it the config of this process, in place of an earlier one."""
    _CONFIGS[:] = [config]


def get_config() -> Config:
    """The config of this process. Raises `IlmCompileError` if there is none yet."""
    if not _CONFIGS:
        raise IlmCompileError(
            "internevo: no config yet: call initialize_distributed_env(config=...) first"
        )
    return _CONFIGS[0]
