"""What differs between the config that a checkpoint was made with and the one that goes on.

By key: what changes the model that the weights are of, what changes the training, and the rest,
which changes neither (the plan, by promise; where is logged, watched and saved).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ilm_compile.models import MODEL_INITIALIZER

# Of `model`: how fresh weights are drawn, which says nothing of those that are loaded.
_OF_FRESH_WEIGHTS = ("init_type", "_init_std", "initializer_range", ".from_seed")
_OF_A_PLACE = ("model.hf",)  # what config.json says there is compared key by key
_OF_THE_GRADIENT = ("embed_grad_scale",)
# Sections that change the training, each without these keys.
_TRAINING: dict[str, tuple[str, ...]] = {
    "train": ("timeout_s", "max_skips", "cudnn_benchmark"),
    "data": ("num_worker", "valid_folder", "valid_every", "valid_batches"),
    "optimizer": (),
    "lr_scheduler": (),
    "beta2_scheduler": (),
    "grad_scaler": (),
    "loss": (),
}


@dataclass(frozen=True, slots=True)
class Change:
    """A key with its value in the checkpoint and in the config."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


def model_changes(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[Change]:
    """The keys of `model` in which two configs, as `Config.to_dict` gives them, differ.

    Those that change what the model computes from given weights. Keys that only one of them has
    were not there when it was written, and are left out.
    """
    return [c for c in _differences(saved, own, "model") if not _is_of_training(c.key)]


def training_changes(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[Change]:
    """The keys in which the configs differ that change how the model is trained."""
    of_model = [c for c in _differences(saved, own, "model") if _is_of_training(c.key)]
    others = [
        change
        for section, left_out in _TRAINING.items()
        for change in _differences(saved, own, section)
        if change.key.partition(".")[2] not in left_out
    ]
    return [*of_model, *others]


def _differences(
    saved: Mapping[str, Any], own: Mapping[str, Any], section: str
) -> Iterator[Change]:
    old, new = (_plain(config.get(section)) for config in (saved, own))
    for key in new:
        if key not in old or old[key] == new[key] or f".{key}".endswith(_OF_FRESH_WEIGHTS):
            continue
        if (section, key) == ("model", "type") and _same_builder(old[key], new[key]):
            continue
        if (name := f"{section}.{key}") not in _OF_A_PLACE:
            yield Change(name, old[key], new[key])


def _is_of_training(key: str) -> bool:
    return key.removeprefix("model.") in _OF_THE_GRADIENT


def _same_builder(first: str, second: str) -> bool:
    """Whether two names are of one model, as INTERNLM2 and INTERNLM2_PUBLIC are."""
    known = [MODEL_INITIALIZER.get_module(n) for n in (first, second) if MODEL_INITIALIZER.has(n)]
    return len(known) == 2 and known[0] is known[1]


def _plain(section: Any) -> dict[str, Any]:
    """A section as a manifest gives it back: lists for tuples."""
    plain = json.loads(json.dumps(section, default=dict))
    return plain if isinstance(plain, dict) else {}


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if type(value) is float else f"{value}"
