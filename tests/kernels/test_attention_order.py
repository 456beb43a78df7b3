"""Which of torch's attention kernels are asked for, in which order, on a device that is made up."""

import pytest
import torch
from torch.nn import attention as torch_attention

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels import set_flash_attention
from ilm_compile.kernels.attention_order import attention_order
from ilm_compile.models import internlm2_tiny
from ilm_compile.partitioning import parallelize
from ilm_compile.runtime import executor

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)
CUDNN, FLASH, EFFICIENT, MATH = (
    getattr(torch_attention.SDPBackend, name)
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
)
OWN = None  # torch's order is left as it is
ORDERS = {
    "before Hopper": (AMPERE, None, OWN),
    "Hopper": (HOPPER, None, [CUDNN, FLASH, EFFICIENT, MATH]),
    "Blackwell": (BLACKWELL, None, [CUDNN, FLASH, EFFICIENT, MATH]),
    "FA3": (HOPPER, "FA3", [FLASH, CUDNN, EFFICIENT, MATH]),
}


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.fixture
def asked(monkeypatch) -> list:
    """What sdpa_kernel is given."""
    seen: list = []
    real = torch_attention.sdpa_kernel

    def sdpa_kernel(backends, set_priority=False):
        seen.append((backends, set_priority))
        return real(backends, set_priority)

    monkeypatch.setattr(torch_attention, "sdpa_kernel", sdpa_kernel)
    return seen


@pytest.mark.parametrize(("capability", "flash", "order"), ORDERS.values(), ids=list(ORDERS))
def test_the_order_on_a_device(monkeypatch, asked, capability, flash, order) -> None:
    pretend(monkeypatch, capability)
    monkeypatch.setattr(torch_attention, "current_flash_attention_impl", lambda: flash)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with attention_order(torch.device("cuda")):
        pass
    assert asked == ([] if order is OWN else [(order, True)])
    assert torch.backends.cuda.cudnn_sdp_enabled() is before


def test_a_kernel_that_is_switched_off_stays_off(monkeypatch, asked) -> None:
    pretend(monkeypatch, HOPPER)
    monkeypatch.setattr(torch_attention, "current_flash_attention_impl", lambda: None)
    with torch_attention.sdpa_kernel([FLASH, MATH]):
        asked.clear()
        with attention_order(torch.device("cuda")):
            assert asked == [([FLASH, MATH], True)]


def test_a_step_runs_in_that_order(monkeypatch) -> None:
    inside: list[str] = []

    class Order:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            inside.append(f"in {self.device}")

        def __exit__(self, *error: object) -> None:
            inside.append("out")

    monkeypatch.setattr(executor, "attention_order", Order)
    model = internlm2_tiny(num_layers=1, vocab_size=64)
    parallel = parallelize(model, example_inputs=model.example_inputs(1, 8))
    stage = parallel.stages[0].module
    stage.register_forward_hook(lambda *_: inside.append("stage"))
    ids = torch.randint(64, (1, 8))
    parallel.execute_schedule({"input_ids": ids, "labels": ids})
    assert inside == ["in cpu", "stage", "out"]


def test_other_names_are_refused() -> None:
    with pytest.raises(IlmCompileError, match="expected FA3 or FA4, or None; got 'FA5'"):
        set_flash_attention("FA5")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_on_the_cpu_it_is_refused() -> None:
    with pytest.raises(IlmCompileError, match="FA3 needs a CUDA device, and torch finds none; the"):
        set_flash_attention("FA3")


@pytest.mark.parametrize(
    ("name", "capability", "needs"),
    [
        ("FA3", AMPERE, "9.x, here is 8.0"),
        ("FA3", BLACKWELL, "9.x"),
        ("FA4", AMPERE, "9.x or 10.x"),
    ],
)
def test_a_device_that_cannot_run_it_is_refused(monkeypatch, name, capability, needs) -> None:
    pretend(monkeypatch, capability)
    with pytest.raises(IlmCompileError, match=f"{name} needs compute capability {needs}"):
        set_flash_attention(name)


@pytest.mark.parametrize("name", ["FA3", "FA4"])
def test_without_its_package_torch_s_own_switch_refuses(monkeypatch, name) -> None:
    """The real switch: the names are those that this torch knows."""
    pretend(monkeypatch, HOPPER)
    with pytest.raises(IlmCompileError, match=f"cannot take {name}: No module named 'flash_attn"):
        set_flash_attention(name)
    assert torch_attention.current_flash_attention_impl() is None


def test_it_is_switched_on_and_off(monkeypatch) -> None:
    pretend(monkeypatch, HOPPER)
    state: list = [None]
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", state.append)
    monkeypatch.setattr(torch_attention, "restore_flash_attention_impl", lambda: state.append(None))
    monkeypatch.setattr(torch_attention, "current_flash_attention_impl", lambda: state[-1])
    for name in ("FA3", None, None):
        set_flash_attention(name)
    assert state == [None, "FA3", None]
