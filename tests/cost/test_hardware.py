"""The hardware table, and the static memory of a parameter."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from ilm_compile.cost import HARDWARE, Hardware, static_bytes_per_parameter
from ilm_compile.cost.constants import HOPPER
from ilm_compile.errors import PlanError


@pytest.fixture(params=HARDWARE.values(), ids=HARDWARE.keys())
def hardware(request: pytest.FixtureRequest) -> Hardware:
    return request.param


def test_known_machines() -> None:
    gpus = {"a100-40g", "a100-80g", "a800", "h100", "h200", "b200", "gb200"}
    assert set(HARDWARE) == gpus | {"cpu"}
    assert all(name == hardware.name for name, hardware in HARDWARE.items())


def test_h100_figures() -> None:
    h100 = HARDWARE["h100"]
    assert h100.usable_flops(torch.bfloat16) == pytest.approx(HOPPER.matmul * 989e12)
    assert h100.usable_bandwidth == pytest.approx(0.8 * 3350e9)
    assert h100.usable_bytes == 80 * 2**30 - 3_890_000_000


def test_hardware_cannot_be_changed_and_can_be_a_key(hardware: Hardware) -> None:
    with pytest.raises(FrozenInstanceError):
        hardware.name = "other"  # type: ignore[misc]
    assert {hardware: 1}[hardware] == 1


def test_narrower_types_are_not_slower(hardware: Hardware) -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    peaks = [hardware.usable_flops(dtype) for dtype in dtypes]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(
    ("dtype", "dp", "zero", "expected"),
    [
        (torch.bfloat16, 1, 1, 16),
        (torch.bfloat16, 4, 1, 8 + 8 / 4),
        (torch.bfloat16, 4, 3, 16 / 4),
        (torch.float32, 1, 1, 16),
        (torch.float32, 4, 1, 8 + 8 / 4),
        (torch.float64, 1, 1, 32),
    ],
)
def test_static_bytes_per_parameter(
    dtype: torch.dtype, dp: int, zero: int, expected: float
) -> None:
    assert static_bytes_per_parameter(dtype, dp=dp, zero=zero) == expected


def test_unknown_zero_is_refused() -> None:
    with pytest.raises(PlanError, match="zero=2 is not supported; use 1 or 3"):
        static_bytes_per_parameter(torch.bfloat16, zero=2)
