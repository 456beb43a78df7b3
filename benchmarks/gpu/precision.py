"""How far a compiled program is from the untransformed model, in float64 and in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ilm_compile
from benchmarks.common import make_model, random_batch
from benchmarks.gpu.failure import Result
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime import Parallel

TOLERANCE = 1e-10
PLANS: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "four micro-batches": {"num_microbatches": 4},
    "recomputed": {"num_microbatches": 4, "checkpoint": True},
}
ROWS = 8

Gradients = dict[str, Tensor]


def equality(device: torch.device, smoke: bool, result: Result) -> None:
    """Relative errors in float64 by plan, without and with a process group (of one process).

    Raises `IlmCompileError` if any is above 1e-10.
    """
    found: dict[str, dict[str, float]] = {}
    result |= {"relative_errors": found, "tolerance": TOLERANCE}
    for name, plan in PLANS.items():
        found[name] = _float64_errors(device, plan)
    with world_of_one(device):
        for name, plan in PLANS.items():
            found[f"{name}, {dist.get_backend()}"] = _float64_errors(device, plan)
    worst = max(error for errors in found.values() for error in errors.values())
    if not worst <= TOLERANCE:
        raise IlmCompileError(f"equality: expected errors of at most {TOLERANCE}, got {found}")


def bfloat16(device: torch.device, smoke: bool, result: Result) -> None:
    """Relative errors against float32: of the CastBF16 program, of eager autocast, of a bf16 model.

    The gradient's is that of all gradients as one vector.
    """
    sizes = {"hidden_size": 64} if smoke else {"hidden_size": 1024, "num_layers": 8}
    seq_len = 16 if smoke else 1024
    batch = random_batch(ROWS, seq_len, 512)

    def fresh() -> nn.Module:
        return make_model("internlm2_tiny", sizes, device="cpu")

    exact = _run_model(fresh().to(device), batch, device)
    parallel = _parallelize(fresh(), seq_len, device, dtype=torch.bfloat16)
    result["CastBF16"] = _errors(_run_parallel(parallel, batch), exact)
    autocast = _run_model(fresh().to(device), batch, device, autocast=True)
    result["eager autocast"] = _errors(autocast, exact)
    low = _run_model(fresh().to(device, torch.bfloat16), batch, device)
    result["eager bfloat16 model"] = _errors(low, exact)


@contextmanager
def world_of_one(device: torch.device) -> Iterator[None]:
    """A process group that holds this process alone: NCCL on a GPU, gloo elsewhere."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = torch.device("cuda", 0) if device.type == "cuda" else None
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=bound)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _float64_errors(device: torch.device, plan: dict[str, Any]) -> dict[str, float]:
    model = make_model("internlm2_tiny", {}, device="cpu").double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # at the initial values all attention is alike
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 * noise)
    batch = random_batch(ROWS, 32, 512)
    parallel = _parallelize(model, 32, device, **plan)
    return _errors(_run_parallel(parallel, batch), _run_model(model.to(device), batch, device))


def _parallelize(model: nn.Module, seq_len: int, device: torch.device, **plan: Any) -> Parallel:
    shape = (ROWS // plan.get("num_microbatches", 1), seq_len)
    example = {name: (shape, torch.int64) for name in ("input_ids", "labels")}
    parallel = ilm_compile.parallelize(model, example_inputs=example, **plan)
    if parallel.mesh.device.type != device.type:
        raise IlmCompileError(
            f"expected to run on {device}, parallelize chose {parallel.mesh.device}"
        )
    return parallel


def _run_parallel(parallel: Parallel, batch: dict[str, Tensor]) -> tuple[Tensor, Gradients]:
    loss = parallel.execute_schedule(batch)
    assert isinstance(loss, Tensor)
    return loss.cpu().double(), {n: g.double() for n, g in parallel.full_gradients().items()}


def _run_model(
    model: nn.Module, batch: dict[str, Tensor], device: torch.device, *, autocast: bool = False
) -> tuple[Tensor, Gradients]:
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss = model(**{name: value.to(device) for name, value in batch.items()})
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach().cpu().double(), {n: g.cpu().double() for n, g in grads.items()}


def _errors(
    found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]
) -> dict[str, float]:
    loss, gradients = found
    true_loss, true_gradients = expected
    difference = torch.stack([(gradients[n] - g).norm() for n, g in true_gradients.items()]).norm()
    size = torch.stack([gradient.norm() for gradient in true_gradients.values()]).norm()
    return {
        "loss": float((loss - true_loss).abs() / true_loss.abs()),
        "gradient": float(difference / size),
    }
