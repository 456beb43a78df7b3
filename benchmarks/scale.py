"""What one rank does of a job, counted in worlds of 8, 128 and 1,024 simulated ranks.

    python -m benchmarks.scale

No other process is started: a rank's share is a function of its place. The rows of a rank, the
model, tp and pp stay, dp grows with the world. `whole_*` is what every rank had to do before it was
given a share. Whatever grows with the world is marked.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.common import RESULTS, make_model, make_parser, save_json, show_table
from ilm_compile import partition
from ilm_compile.passes import lower
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import FromInputs
from ilm_compile.runtime.batch import BatchLayout
from ilm_compile.runtime.checkpoint.boxes import Box
from ilm_compile.runtime.checkpoint.manifest import File, Manifest, Record, Slice
from ilm_compile.runtime.checkpoint.parts import Part, contents, part_name
from ilm_compile.runtime.checkpoint.slices import SliceReader, read_manifest
from ilm_compile.runtime.checkpoint.storage import MANIFEST, LocalStorage
from ilm_compile.runtime.checkpoint.written import fill
from ilm_compile.runtime.data import BatchIterator, DummyDataset, TokenDataset, shard, write_shard
from ilm_compile.runtime.data import Part as RowPart
from ilm_compile.runtime.data.shard_folder import open_shards, summarize
from ilm_compile.runtime.guard.report import Board, Member
from ilm_compile.runtime.mesh import Axis, Mesh
from ilm_compile.runtime.step_inputs import StepInputs

WORLDS = (8, 128, 1024)
TP, PP, MICRO_BATCHES, ROWS, SEQ, STEPS = 2, 2, 4, 2, 32, 2
LAYERS, CHUNK = 8, 16  # of the checkpoint: layers of a stage, rows of a tensor on a rank
FOLDER = "step-00000001"


Counts = Counter[str]  # of one rank


class CountingStorage(LocalStorage):
    """Counts files that are opened and bytes of manifests."""

    def __init__(self, root: Path, counts: Counts) -> None:
        super().__init__(root)
        self._counts = counts

    @contextmanager
    def open(self, path: str) -> Iterator[Any]:
        self._counts["checkpoint_files"] += 1
        self._counts["manifest_bytes"] += self.size(path)
        with super().open(path) as file:
            yield file


def measure(world: int, folder: Path) -> dict[str, Any]:
    """The counts of one rank in the middle of a world. folder: an empty one."""
    dp, counts = world // (TP * PP), Counts()
    program()
    start = time.process_time()
    take_batches(dp, counts)
    cpu = {"batches_cpu_s": round(time.process_time() - start, 3)}
    read_token_files(folder / "tokens", world, counts)
    whole = write_checkpoint(folder, world)
    start = time.process_time()
    read_checkpoint(folder, world, counts)
    cpu["checkpoint_cpu_s"] = round(time.process_time() - start, 3)
    watch(folder / "monitor", world, counts)
    make_groups(world, counts)
    rows = ROWS * MICRO_BATCHES * dp * STEPS
    return {"world": world, **counts, "whole_rows": rows, **whole, **cpu}


@cache
def program() -> LoweredProgram:
    """A small one, of which only the inputs and the count of targets are used."""
    model = make_model("internlm2_tiny", {"num_layers": 2, "max_seq_len": SEQ})
    spec = {name: ((ROWS, SEQ), torch.int64) for name in ("input_ids", "labels")}
    return lower(partition(model, example_inputs=spec, num_microbatches=MICRO_BATCHES))


def take_batches(dp: int, counts: Counts) -> None:
    """Read batches, and give them to the rank's micro-batches."""
    lowered = program()
    axis = Axis(dp // 2, dp)
    inputs = StepInputs.of(
        lowered,
        lowered.stages,
        num_microbatches=MICRO_BATCHES,
        dp=axis,
        device=torch.device("cpu"),
    )
    data = DummyDataset(num_rows=100_000, seq_len=SEQ, vocab_size=64)
    batches = BatchIterator(
        data,
        global_batch_size=ROWS * MICRO_BATCHES * dp,
        part=RowPart(axis.rank, axis.size),
    )
    read, found = DummyDataset.batch, FromInputs.of

    def reading(dataset: DummyDataset, rows: Tensor) -> dict[str, Tensor]:
        counts["rows_read"] += len(rows)
        batch = read(dataset, rows)
        counts["bytes_read"] += sum(value.nbytes for value in batch.values())
        return batch

    def finding(what: FromInputs, batch: Mapping[str, Tensor], num_slices: int) -> list[Tensor]:
        counts["microbatch_iterations"] += num_slices
        return found(what, batch, num_slices)

    with (
        mock.patch.object(DummyDataset, "batch", reading),
        mock.patch.object(FromInputs, "of", finding),
    ):
        for step, batch in enumerate(islice(batches, STEPS)):
            own = {name: batch[name] for name in lowered.inputs}
            layout: BatchLayout = inputs.layout
            layout.check(own, is_local=True)
            inputs.of_rows(own, inputs.count(own), step)


def read_token_files(folder: Path, world: int, counts: Counts) -> None:
    """The files of a document and row each that are opened besides those of the rows."""
    for number in range(ROWS * MICRO_BATCHES + world // 4):
        write_shard(folder / f"{number:05d}.bin", [[1] * SEQ])
    summarize(folder, open_shards(folder), is_final=True)
    read, opened = shard.read_index, set()

    def opening(path: Path, num_bytes: int) -> Any:
        opened.add(path)
        return read(path, num_bytes)

    with mock.patch.object(shard, "read_index", opening):
        data = TokenDataset.open(folder, seq_len=SEQ, vocab_size=2, max_documents=1)
        size = ROWS * MICRO_BATCHES
        batches = BatchIterator(data, global_batch_size=size, part=RowPart(0, 1))
        next(batches)
        batches.state_dict()
    counts["other_token_files"] += 1 + len(opened) - ROWS * MICRO_BATCHES  # the summary


def write_checkpoint(folder: Path, world: int) -> dict[str, int]:
    """A checkpoint as all ranks write it, with no data in its files; what one manifest would be."""
    path = folder / FOLDER
    path.mkdir()
    given: dict[str, list[int]] = {}
    merged = Manifest(1, world, {}, {}, {}, [])
    for rank in range(world):
        part = Part("1-scale", rank, {f"rank-{rank:05d}-000.safetensors": File(1 << 30, "0" * 64)})
        for name, record in slices_of(rank, world).items():
            part.tensors[name] = record
            whole = merged.tensors.setdefault(name, Record(record.dtype, record.shape))
            whole.slices += record.slices
        merged.files |= part.files
        (path / part_name(rank)).write_bytes(part.to_bytes())
        kinds = {n: [list(r.shape), "F32", False] for n, r in part.tensors.items()}
        given.setdefault(json.dumps([kinds, []]), []).append(rank)
    manifest = Manifest(1, world, {}, {}, {}, [], save="1-scale")
    fill(manifest, given)
    (path / MANIFEST).write_bytes(manifest.to_bytes())
    return {"whole_manifest_bytes": len(merged.to_bytes())}


def slices_of(rank: int, world: int) -> dict[str, Record]:
    """Weights cut by tp and dp, and norms that tp does not cut, as `CheckpointManager` saves."""
    dp = world // (TP * PP)
    stage, (at, tp) = rank // (dp * TP), divmod(rank % (dp * TP), TP)
    found = {}
    for layer in range(stage * LAYERS, (stage + 1) * LAYERS):
        for kind in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
            kinds = [("weight", (dp * CHUNK, TP * 4), (at * CHUNK, tp * 4), (CHUNK, 4))]
            kinds += [("norm", (dp * CHUNK,), (at * CHUNK,), (CHUNK,))] if tp == 0 else []
            for what, shape, start, sizes in kinds:
                name = f"{kind}/layers.{layer}.{what}"
                piece = Slice(f"rank-{rank:05d}-000.safetensors", name, Box(start, sizes))
                found[name] = Record(torch.float32, shape, [piece])
    return found


def read_checkpoint(folder: Path, world: int, counts: Counts) -> None:
    """Check the rank's share and find what it needs, under the plan that saved."""
    storage, rank = CountingStorage(folder, counts), world - 1
    manifest = read_manifest(storage, FOLDER)
    for _ in contents(storage, FOLDER, manifest, rank=rank, size=world):
        pass
    reader = SliceReader(storage, FOLDER, manifest, place=rank, places=world)
    own = {**slices_of(rank - rank % TP, world), **slices_of(rank, world)}
    with mock.patch.object(SliceReader, "read_slice", _zeros):
        for name, record in own.items():
            reader.read(name, record.slices[0].box)


def _zeros(reader: SliceReader, record: Record, piece: Slice, box: Box) -> Tensor:
    return torch.zeros(box.sizes, dtype=record.dtype)


def watch(folder: Path, world: int, counts: Counts) -> None:
    """What a watchdog looks at every second."""
    folder.mkdir()
    board = Board(folder)
    for rank in range(min(world, 64)):
        board.join(Member(rank, 1, "host"))
    listed, exists = Path.glob, Path.exists

    def listing(path: Path, pattern: str) -> list[Path]:
        found = list(listed(path, pattern))
        counts["watched_files"] += len(list(path.iterdir()))
        return found

    def looking(path: Path) -> bool:
        counts["watched_files"] += 1
        return exists(path)

    with mock.patch.object(Path, "glob", listing), mock.patch.object(Path, "exists", looking):
        board.is_hung()


def make_groups(world: int, counts: Counts) -> None:
    """The process groups of the mesh, and one of the stages that share a parameter."""
    make = dist.new_group

    def making(*arguments: Any, **options: Any) -> Any:
        counts["process_groups"] += 1
        return make(*arguments, **options)

    dist.init_process_group("fake", rank=world - 1, world_size=world, store=FakeStore())
    try:
        with mock.patch.object(dist, "new_group", making):
            mesh = Mesh.create(Plan(tp=TP, pp=PP), device="cpu")
            mesh.pipeline_group((0, PP - 1))
    finally:
        dist.destroy_process_group()


GROWING = ("whole_", "_cpu_s", "world")


def growing(rows: Sequence[dict[str, Any]], *, tolerance: float = 0.05) -> list[str]:
    """The counts that are larger in the last row than in the first, by more than a few digits."""
    first, last = rows[0], rows[-1]
    counted = [name for name in first if not any(word in name for word in GROWING)]
    return [name for name in counted if last[name] > first[name] * (1 + tolerance)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save; 1 if something grows."""
    parser = make_parser("scale", __doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS))
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args(arguments)
    rows = []
    for world in options.worlds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(world, Path(folder)))
    bad = growing(rows)
    show(rows, bad)
    save_json(options.out, {"rows": rows, "growing": bad})
    return 1 if bad else 0


def show(rows: Sequence[dict[str, Any]], bad: Sequence[str]) -> None:
    """Print a line for each count."""
    names = [name for name in rows[0] if name != "world"]
    lines = [(f"{n} !" if n in bad else n, *(f"{row[n]:,}" for row in rows)) for n in names]
    show_table(None, ("per rank", *(f"{row['world']} ranks" for row in rows)), lines)


if __name__ == "__main__":
    raise SystemExit(main())
