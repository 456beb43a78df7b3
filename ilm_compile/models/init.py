"""Initial weights that depend on the seed and the parameter's name, and on nothing else.

A parameter is drawn in chunks of whole rows, each from a generator of its own, so a rank that
holds some rows draws only the chunks that touch them and gets the same bits as everyone else.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.models.config import ModelConfig

MAX_CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True, slots=True)
class Constant:
    """Every element is `value`."""

    value: float


@dataclass(frozen=True, slots=True)
class Random:
    """Zero mean; standard deviation from the config field `std`.

    depth_scaled: divided by sqrt(2 * (layer + 1)), the layer counted from 0 over the whole model.
    """

    std: str
    depth_scaled: bool = False


InitTable = Mapping[str, Constant | Random]


def initial_value(
    name: str,
    shape: tuple[int, ...],
    table: InitTable,
    config: ModelConfig,
    *,
    rows: tuple[int, int] | None = None,
    seed: int,
) -> Tensor:
    """Initial float32 value, on CPU, of the parameter `name` or of its rows [start, stop).

    table: from the name with the layer number taken out ("blocks.norm1.weight") to its kind.
    """
    kind = table[re.sub(r"\.\d+\.", ".", name)]
    start, stop = _checked_rows(name, shape, rows)
    out = torch.empty(stop - start, *shape[1:], dtype=torch.float32, device="cpu")
    if isinstance(kind, Constant):
        return out.fill_(kind.value)

    std: float = getattr(config, kind.std)
    if kind.depth_scaled:
        std /= math.sqrt(2 * (_layer(name) + 1))
    per_chunk = max(1, MAX_CHUNK_ELEMENTS // math.prod(shape[1:]))
    for chunk in range(start // per_chunk, -(-stop // per_chunk)):
        first = chunk * per_chunk
        last = min(first + per_chunk, shape[0])
        low, high = max(first, start), min(last, stop)
        values = torch.empty(last - first, *shape[1:], dtype=torch.float32, device="cpu")
        _draw(values, std, config.init_type, _generator(seed, name, chunk))
        out[low - start : high - start] = values[low - first : high - first]
    return out


def initialize_(model: nn.Module, seed: int) -> None:
    """Fills every parameter of one of our models in place, in the dtype and place it has."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(model.initial_parameter(name, seed=seed))  # type: ignore[operator]


def _draw(values: Tensor, std: float, init_type: str, generator: torch.Generator) -> None:
    if init_type == "normal":
        values.normal_(generator=generator).mul_(std)
    else:
        # Uniform on [-a, a] has variance a^2 / 3.
        values.uniform_(-1.0, 1.0, generator=generator).mul_(math.sqrt(3) * std)


def _generator(seed: int, name: str, chunk: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}:{chunk}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little"))


def _layer(name: str) -> int:
    match = re.search(r"\.(\d+)\.", name)
    assert match is not None, f"{name} is scaled by depth but has no layer number"
    return int(match.group(1))


def _checked_rows(
    name: str, shape: tuple[int, ...], rows: tuple[int, int] | None
) -> tuple[int, int]:
    start, stop = (0, shape[0]) if rows is None else rows
    if not 0 <= start <= stop <= shape[0]:
        raise IlmCompileError(
            f"initial value of {name}: expected rows within (0, {shape[0]}), got {rows}"
        )
    return start, stop
