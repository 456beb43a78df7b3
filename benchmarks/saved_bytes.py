"""Bytes that a block keeps for its backward: `python -m benchmarks.saved_bytes`.

Measured in real steps on the CPU: every storage that autograd saves counts once; parameters,
buffers and the batch do not. The plain model, and torch.compile of it (what Inductor's partitioner
keeps, without its kernels), are measured with three blocks and with two: the difference is a
block. Of ours it is what the middle block of three saves, beside what `Program.explain` says of it.
"fused" is with the ops that have kernels, in the form that they have on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

import ilm_compile
from benchmarks.common import RESULTS, make_console, make_parser, random_batch, save_json
from benchmarks.families import FAMILIES, VOCAB, make_family
from ilm_compile.passes import FuseKernels, FuseResidual, lower
from ilm_compile.runtime import Mesh, Parallel
from ilm_compile.runtime.observe.saved import SavedBytes
from ilm_compile.schedule import schedule_of

ROWS, TOKENS, HIDDEN = 2, 64, 256
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FUSED: dict[str, Any] = {"passes": [FuseKernels(), FuseResidual()]}
SELECTIVE: dict[str, Any] = {"checkpoint": "selective"}
PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, selective": SELECTIVE,
    "fused": FUSED,
    "fused, selective": FUSED | SELECTIVE,
}
COMPILED = "torch.compile"


@dataclass(frozen=True)
class Row:
    """Bytes of a block. predicted: None where nothing predicts. per_token: in hidden sizes."""

    model: str
    dtype: str
    way: str
    measured: int
    predicted: int | None

    @property
    def per_token(self) -> float:
        return self.measured / (ROWS * TOKENS * HIDDEN)


def measure(name: str, dtype: str) -> Iterator[Row]:
    """The rows of one model: plain PyTorch, torch.compile, and each of `PLANS`."""
    batch = random_batch(ROWS, TOKENS, VOCAB)
    two, three = (
        make_family(name, hidden=HIDDEN, layers=layers, dtype=DTYPES[dtype]) for layers in (2, 3)
    )
    wrappers: dict[str, Callable[[nn.Module], Any]] = {
        "PyTorch": lambda model: model,
        COMPILED: lambda model: torch.compile(model, dynamic=False, backend=_partitioned),
    }
    for way, wrap in wrappers.items():
        both = [saved_by(wrap(model), model, batch) for model in (two, three)]
        yield Row(name, dtype, way, both[1] - both[0], None)
    traced = ilm_compile.trace(
        three, example_inputs={key: (v.shape, v.dtype) for key, v in batch.items()}
    )
    for way, plan in PLANS.items():
        program = ilm_compile.compile(traced, **plan)
        block = [n for n, region in enumerate(program.regions) if region.is_block][1]
        assert program.region_bytes is not None
        predicted = program.region_bytes(program)[0, block][0]
        parallel = Parallel(
            lower(program), schedule_of(program.plan), Mesh.create(program.plan), three
        )
        watch = SavedBytes(parallel.stages)
        watch.start()
        parallel.execute_schedule(batch)
        watch.stop()
        measured = watch.bytes[0][program.regions[block].name.replace(".", "_")]
        yield Row(name, dtype, way, measured, predicted)


def saved_by(run: Any, model: nn.Module, batch: dict[str, Tensor]) -> int:
    """What one forward of `run`, which is `model` or is made of it, keeps for its backward."""
    torch.compiler.reset()  # it compiles one function for eight models at most
    run(**batch)
    alive = [*model.parameters(), *model.buffers(), *batch.values()]
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in alive}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run(**batch)
    return sum(kept.values())


def _partitioned(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    """Inductor up to where it would write kernels."""
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(
        graph, inputs, inner_compile=lambda part, *_, **__: make_boxed_func(part.forward)
    )


def main() -> None:
    parser = make_parser("saved_bytes", __doc__)
    parser.add_argument("--models", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row for name in options.models for dtype in options.dtypes for row in measure(name, dtype)
    ]
    table = Table("model", "dtype", "way", "bytes", "x hidden per token", "predicted")
    for row in rows:
        said = "" if row.predicted is None else f"{row.predicted:,}"
        table.add_row(
            row.model, row.dtype, row.way, f"{row.measured:,}", f"{row.per_token:.1f}", said
        )
    make_console().print(table)
    sizes = {"rows_per_batch": ROWS, "tokens": TOKENS, "hidden": HIDDEN}
    save_json(RESULTS / "saved_bytes.json", {**sizes, "rows": rows})


if __name__ == "__main__":
    main()
