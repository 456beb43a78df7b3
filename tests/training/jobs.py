"""A tiny training job, as a config and as what ranks of a world run."""

import json
from pathlib import Path
from typing import Any

import torch

from ilm_compile.config import Config, make_config

TINY: dict[str, Any] = {
    "job_name": "tiny",
    "model": {
        "type": "INTERNLM2",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_kv_attention_heads": 2,
        "vocab_size": 260,
        "mlp_ratio": 2.0,
    },
    "train": {"total_steps": 4},
    "data": {"type": "pydoc", "seq_len": 32, "micro_bsz": 1, "micro_num": 2},
    "optimizer": {"lr": 1e-2},
    "lr_scheduler": {"warmup_ratio": 0.25, "eta_min": 1e-3},
    "ckpt": {"every": 2},
    "logging": {"console": False},
}


def tiny(folder: Path, *overrides: str, **sections: dict[str, Any]) -> Config:
    """The tiny job with its runs in `folder`."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return make_config(values, [f"logging.folder={folder}", *overrides])


def metrics(folder: Path, job: str = "tiny") -> list[dict[str, Any]]:
    """The lines of the job's metrics.jsonl."""
    return [json.loads(line) for line in (folder / job / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, job: str = "tiny") -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in metrics(folder, job) if "group" not in line]


def train_on(rank: int, config: Config) -> tuple[int, str | None]:
    """Train on this rank; the steps done and why it stopped."""
    from ilm_compile import train

    torch.use_deterministic_algorithms(False)
    trainer = train(config)
    return trainer.num_steps, trainer.stop_reason
