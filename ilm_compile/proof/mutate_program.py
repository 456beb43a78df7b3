"""Faults of compiled programs: every way in which passes have been seen to go wrong, as edits."""

from __future__ import annotations

from ilm_compile.proof import (
    mutate_casts,
    mutate_inputs,
    mutate_sharding,
    mutate_training,
    mutate_values,
)
from ilm_compile.proof.mutate_places import Edit as Edit
from ilm_compile.proof.mutate_places import Kind
from ilm_compile.proof.mutate_places import Place as Place
from ilm_compile.proof.mutate_places import mutated as mutated

KINDS: dict[str, Kind] = {
    **mutate_sharding.KINDS,
    **mutate_values.KINDS,
    **mutate_inputs.KINDS,
    **mutate_training.KINDS,
    **mutate_casts.KINDS,
}
