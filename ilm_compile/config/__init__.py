"""Config files: TOML and those of a `Dialect`, read without running code, and checked.

`load_config` -> `Config`, a tree of frozen dataclasses; `schema.py` lists every key.
"""

from ilm_compile.config.config import Config as Config
from ilm_compile.config.load import load_config as load_config
from ilm_compile.config.load import make_config as make_config
from ilm_compile.config.table import ConfigError as ConfigError
