"""Small configs made in a test, and what is wrong with them."""

from typing import Any

import pytest

from ilm_compile.config import Config, ConfigError, make_config

SIZES = {"num_layers": 2, "hidden_size": 64, "vocab_size": 512, "num_attention_heads": 4}
SMALL: dict[str, Any] = {
    "model": {"type": "INTERNLM2", "num_kv_attention_heads": 2, **SIZES},
    "train": {"total_steps": 100},
    "data": {"seq_len": 32, "type": "random"},
}


def config(*overrides: str, **sections: Any) -> Config:
    values = {key: dict(value) for key, value in SMALL.items()}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return make_config(values, overrides)


def fault(*overrides: str, **sections: Any) -> str:
    with pytest.raises(ConfigError) as error:
        config(*overrides, **sections)
    return str(error.value)
