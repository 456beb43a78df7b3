"""What the GPU suite says of kernels: its bytes, its verdicts, the faults it must find."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import bandwidth, correctness, guarantees
from benchmarks.gpu.bandwidth import Entry, Row, judge
from benchmarks.gpu.correctness import Task, check
from benchmarks.gpu.failure import Deadline, SectionError
from benchmarks.gpu.layouts import LAYOUTS
from benchmarks.gpu.ops import CHECKED, FAMILIES, TIMED
from benchmarks.gpu.ops.op import KernelOp, Tensors, maker
from benchmarks.gpu.peers import COMPILED, EAGER, load_peers
from benchmarks.gpu.pool import run_all
from benchmarks.gpu.reference import poisoned
from benchmarks.gpu.timing import Times, measure

CPU = torch.device("cpu")

# Of 3 rows of 128 numbers in bf16, by hand. R = 768 bytes is a tensor of rows, W = 256 a weight.
# Rotary: one head of queries, one of keys, and tables of 3 x 64 float32 twice, T = 1536 bytes.
R, W, T = 3 * 128 * 2, 128 * 2, 2 * 3 * 64 * 4
BYTES = {
    "rms_norm": (R + W + R, R + (R + W) + (R + W)),  # x w -> y; dy, x w -> dx dw
    "add_rms_norm": (2 * R + W + 2 * R, 2 * R + (R + W) + (R + W)),  # one gradient for two
    "swiglu": (3 * R, R + 2 * R + 2 * R),
    "rotary": (2 * R + T + 2 * R, 2 * R + T + 2 * R),
    "qkv_rotary": (3 * R + T + 3 * R, 3 * R + T + 3 * R),
}


@pytest.mark.parametrize("name", TIMED)
def test_bytes_are_those_counted_by_hand(name: str) -> None:
    op = TIMED[name]
    inputs = op.inputs(maker(CPU, torch.bfloat16, 0), 3, 128)
    outputs = op.fused(inputs)
    found = (op.forward_bytes(inputs, outputs), op.backward_bytes(inputs, outputs))
    assert found == BYTES[name]


def test_two_gradients_are_written_where_their_dtypes_differ() -> None:
    op = CHECKED["add_rms_norm, float32 residual"]
    inputs = op.inputs(maker(CPU, torch.bfloat16, 0), 3, 128)
    outputs = op.fused(inputs)
    # dy, dsum in float32; sum in float32, weight; dx, dresidual in float32, dweight
    assert op.backward_bytes(inputs, outputs) == (R + 2 * R) + (2 * R + W) + (R + 2 * R + W)


def spoiled(op: KernelOp, spoil: Callable[[Tensor], Tensor]) -> KernelOp:
    """The op with its first output changed, not its gradients; right in float64, the reference."""

    def fused(t: Tensors) -> tuple[Tensor, ...]:
        first, *others = op.fused(t)
        if first.dtype == torch.float64:
            return first, *others
        change = (spoil(first.double()) - first.double()).detach()
        return (first + change.to(first.dtype), *others)

    return replace(op, fused=fused)


def forget_one(y: Tensor) -> Tensor:
    return torch.where(torch.arange(y.numel()).reshape(y.shape) == 0, torch.empty_like(y), y)


@pytest.mark.parametrize("spoil", [lambda y: y * 1.02, forget_one], ids=["wrong", "forgotten"])
@pytest.mark.parametrize("name", ["rms_norm", "attention"])
def test_a_wrong_kernel_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[Tensor], Tensor]
) -> None:
    monkeypatch.setitem(correctness.CHECKED, name, spoiled(CHECKED[name], spoil))
    errors = check(Task(name, 64, CPU, 0, True))
    assert {error.dtype for error in errors if error.fault} == {"float32", "float16", "bfloat16"}
    assert {error.tensor for error in errors if error.fault} == {"y"}


def test_an_error_within_the_bound_but_twice_plain_torchs_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    op = spoiled(CHECKED["rms_norm"], lambda y: y * (1 + 8e-7))
    monkeypatch.setitem(correctness.CHECKED, "rms_norm", op)
    faults = [e for e in check(Task("rms_norm", 64, CPU, 0, True)) if e.fault]
    assert faults
    assert all(e.error < 1e-6 and "plain torch" in str(e.fault) for e in faults)


def test_an_error_above_the_bound_is_found_though_plain_torchs_is_as_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    op = spoiled(CHECKED["rms_norm"], lambda y: y * 1.02)
    monkeypatch.setitem(correctness.CHECKED, "rms_norm", replace(op, plain=op.fused))
    faults = [e for e in check(Task("rms_norm", 64, CPU, 0, True)) if e.fault]
    assert {str(e.fault) for e in faults} == {"above 1e-06", "above 0.001", "above 0.005"}


def test_processes_share_the_work_until_the_deadline() -> None:
    assert sorted(run_all(abs, [-1, -2, -3], CPU, Deadline(60), num_processes=1)) == [1, 2, 3]
    assert list(run_all(time.sleep, [60.0], CPU, Deadline(0.1), num_processes=1)) == []


def test_a_kernel_that_raises_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(t: Tensors) -> tuple[Tensor, ...]:
        raise RuntimeError("illegal memory access")

    monkeypatch.setitem(correctness.CHECKED, "swiglu", replace(CHECKED["swiglu"], fused=fail))
    result: dict[str, Any] = {}
    with pytest.raises(SectionError, match="illegal memory access"):
        correctness.kernel_correctness(CPU, True, result)
    assert {fault.op for fault in result["faults"]} == {"swiglu"}


def test_new_tensors_are_poisoned_inside_only() -> None:
    with poisoned(CPU):
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_shapes_and_most_of_them_values(layout: str) -> None:
    x = torch.randn(5, 12)
    found = LAYOUTS[layout][0](x)
    assert found.shape == x.shape
    assert layout == "expanded" or torch.equal(found, x)
    assert found.is_contiguous() == (layout == "contiguous")


def test_a_fault_at_the_end_of_a_long_tensor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(y: Tensor) -> Tensor:
        far = torch.arange(y.numel()).reshape(y.shape) >= guarantees.SMOKE_LONG
        return torch.where(far, y.flatten()[0], y)  # where an offset that wrapped around points

    monkeypatch.setitem(guarantees.FAMILIES, "swiglu", spoiled(FAMILIES["swiglu"], overflow))
    result: dict[str, Any] = {}
    with pytest.raises(SectionError, match=r"more than 2\^31 elements, swiglu: errors"):
        guarantees.kernel_guarantees(CPU, True, result)
    assert len(result["faults"]) == 1


def test_compilations_are_counted() -> None:
    knobs = pytest.importorskip("triton").knobs
    with guarantees.compilations() as compiled:
        knobs.runtime.jit_post_compile_hook(key="", repr="kernel[num_warps=4]", fn=None)
    assert compiled == ["kernel[num_warps=4]"]
    assert knobs.runtime.jit_post_compile_hook is None


def row(direction: str, ours: float, peers: dict[str, float], rows: int = 8192) -> Row:
    """fractions by name, of a copy that takes 1 s."""
    entries = {
        name: Entry(1.0, fraction, fraction, Times(1 / fraction, (0.0, 0.0), 0.0, 1))
        for name, fraction in {"ilm": ours, **peers}.items()
    }
    return judge(Row("rms_norm", direction, 4096, 4096, rows, 1, entries))


@pytest.mark.parametrize(
    ("direction", "fraction", "rows", "outcome"),
    [
        ("forward", 0.90, 8192, "ok"),
        ("forward", 0.89, 8192, "missed"),
        ("backward", 0.85, 8192, "ok"),
        ("backward", 0.84, 8192, "missed"),
        ("forward", 0.5, 4096, "-"),
    ],
)
def test_the_goal_of_bandwidth(direction: str, fraction: float, rows: int, outcome: str) -> None:
    assert row(direction, fraction, {}, rows).goals == {"bandwidth": outcome, "fastest": "-"}


@pytest.mark.parametrize(("ours", "outcome"), [(0.9, "ok"), (0.796, "ok"), (0.79, "missed")])
def test_the_goal_of_being_the_fastest(ours: float, outcome: str) -> None:
    found = row("forward", ours, {"slow": 0.4, "fast": 0.8}, 4096)
    assert (found.best_peer, found.goals["fastest"]) == ("fast", outcome)
    assert found.ratio == pytest.approx(ours / 0.8)


def test_missing_peers_are_left_out_and_said() -> None:
    found, left_out = load_peers("rms_norm", CPU)
    assert list(found) == [COMPILED, EAGER]
    assert set(left_out) == {"Liger", "flash-attn", "QuACK"}
    assert left_out["Liger"] == "ModuleNotFoundError: No module named 'liger_kernel'"


def test_a_peer_that_is_there_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    class Norm:
        @staticmethod
        def apply(x: Tensor, w: Tensor, eps: float, offset: float, casting: str) -> Tensor:
            assert (offset, casting) == (0.0, "gemma")
            return torch.nn.functional.rms_norm(x, w.shape, w, eps)

    module: Any = ModuleType("liger_kernel.ops.rms_norm")
    module.LigerRMSNormFunction = Norm
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ModuleType("liger_kernel.ops"))
    result: dict[str, Any] = {}
    bandwidth.bandwidth(CPU, True, result)
    assert all("Liger" in r.entries for r in result["rows"] if r.op == "rms_norm")


def test_a_peer_that_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {"doubling": lambda: lambda t: (2 * t["gate"] * t["up"],)}
    monkeypatch.setitem(bandwidth.load_peers.__globals__["PEERS"], "swiglu", peers)
    result: dict[str, Any] = {}
    bandwidth.bandwidth(CPU, True, result)
    assert "something else" in result["peers_left_out"]["swiglu"]["doubling"]
    assert all("doubling" not in r.entries for r in result["rows"])


def test_times_leave_out_what_comes_before() -> None:
    seen: list[int] = []

    def before() -> int:
        seen.append(len(seen))
        return seen[-1]

    times = measure(lambda given: seen[given], CPU, before=before, smoke=True)
    assert len(seen) == 4  # warm-up, estimate, two repeats
    assert (times.repeats, math.isclose(times.median_s, times.host_s)) == (2, True)


def test_the_sweep_tries_the_tables_choice_and_marks_it() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu.sweep import candidates, sweep
    from ilm_compile.kernels.launch import launch_for
    from ilm_compile.kernels.triton_norm import BACKWARD

    result: dict[str, Any] = {}
    sweep(CPU, True, result)
    found = result["choices"]
    assert [choice.in_table for choice in found].count(True) == 1
    assert all(choice.fault is None for choice in found)
    tried = list(candidates(8192))
    assert tried[0] == launch_for(BACKWARD, 8192)
    assert {(c.block, c.pieces) for c in candidates(6144)} == {(2048, 3), (8192, 1)}
    assert len(tried) == len(set(tried)) > 20
    assert min(launch.max_registers for launch in tried) >= 32
