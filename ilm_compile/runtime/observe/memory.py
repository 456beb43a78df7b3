"""What fills a rank's memory: parameters, gradients, optimizer state and activations by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ilm_compile.files import write_text
from ilm_compile.runtime.agree import exchange
from ilm_compile.runtime.hooks import Hook
from ilm_compile.runtime.metrics import StepMetrics
from ilm_compile.runtime.observe.memory_picture import KINDS, Breakdown, draw_memory
from ilm_compile.runtime.observe.places import rank_words
from ilm_compile.runtime.observe.saved import SavedBytes
from ilm_compile.runtime.parallel import Parallel
from ilm_compile.runtime.trainer import Trainer
from ilm_compile.schedule import Action, Kind


class MemoryBreakdown(Hook):
    """Measures step number `step` and draws it into ``memory-rank-R.html`` in `folder`.

    Parameters, gradients and optimizer state are what this rank keeps between steps; activations
    what its forwards keep for their backwards at the fullest moment of the schedule. Not seen are
    the whole parameters and gradients of which data parallelism holds a share, while they are
    gathered, and what an op needs while it runs: on CUDA the peak of torch's allocator in that step
    stands beside, which has all. Only one rank of each pipeline stage draws: the
    first of its dp and tp ranks.
    """

    def __init__(self, folder: str | Path, *, step: int = 3) -> None:
        self._folder = Path(folder)
        self._step = step
        self._saved: SavedBytes | None = None

    def on_step_start(self, trainer: Trainer, step: int) -> None:
        if step == self._step:
            self._saved = SavedBytes(trainer.parallel.stages)
            self._saved.start()
            if (device := trainer.parallel.mesh.device).type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._saved is None:
            return
        saved, self._saved = self._saved, None
        saved.stop()
        parallel = trainer.parallel
        modules = breakdown(parallel, trainer.optimizer, saved.bytes)
        own = [float(sum(sizes[kind] for sizes in modules.values())) for kind in KINDS]
        mesh = parallel.mesh
        has_peak = mesh.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(mesh.device) if has_peak else 0
        table = exchange([*own, float(peak)], mesh)
        if mesh.is_first_replica:
            rows = {
                rank_words(mesh, pp): [int(size) for size in table[mesh.rank_at(pp, 0, 0)]]
                for pp in range(mesh.pp.size)
            }
            text = draw_memory(
                rank_words(mesh, mesh.pp.rank),
                {name: Counter(dict(zip(KINDS, row, strict=False))) for name, row in rows.items()},
                modules,
                step=metrics.step,
                peaks={name: row[-1] for name, row in rows.items()} if has_peak else None,
            )
            write_text(self._folder / f"memory-rank-{mesh.rank}.html", text)

    def on_stop(self, trainer: Trainer) -> None:
        if self._saved is not None:
            self._saved.stop()
            self._saved = None


def breakdown(
    parallel: Parallel, optimizer: Optimizer, saved: Mapping[int, Mapping[str, int]]
) -> Breakdown:
    """The bytes of each kind in each region, under the names of the user's modules in it.

    saved: by stage index and region, what one micro-batch keeps.
    """
    labels = {stage.index: region_labels(stage.variables) for stage in parallel.stages}
    homes = {
        name: labels[stage.index][_region(path)]
        for stage in parallel.stages
        for name, path in stage.variables.items()
    }
    # In the order of the stages, which is that of the model.
    regions: Breakdown = {label: Counter() for stage in labels.values() for label in stage.values()}
    for name, parameter in parallel.named_parameters():
        sizes = regions.setdefault(homes.get(name, "unused"), Counter())
        sizes["parameters"] += _nbytes(parameter)
        if parameter.grad is not None:
            sizes["gradients"] += _nbytes(parameter.grad)
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor):
                sizes["optimizer"] += _nbytes(value)
    live = live_microbatches(
        parallel.schedule.actions[parallel.mesh.pp.rank],
        {stage: sum(sizes.values()) for stage, sizes in saved.items()},
    )
    for stage, kept in saved.items():
        for region, num_bytes in kept.items():
            label = labels[stage].get(region, f"stage {stage}")
            sizes = regions.setdefault(label, Counter())
            sizes["activations"] += live.get(stage, 0) * num_bytes
    return {label: sizes for label, sizes in regions.items() if sizes}


def region_labels(variables: Mapping[str, str]) -> dict[str, str]:
    """The modules of each region of a stage, by region name. variables: name to path there."""
    modules: dict[str, dict[str, None]] = {}
    for name, path in variables.items():
        modules.setdefault(_region(path), {})[module_of(name)] = None
    return {region: ", ".join(names) for region, names in modules.items()}


def module_of(parameter: str) -> str:
    """The module a parameter is shown under: a numbered block, or else one at the top.

    "layers.3.attention.wqkv.weight" belongs to "layers.3", "output.weight" to "output".
    """
    parts = parameter.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: position + 1])
    is_wrapped = len(parts) > 2 and parts[0] == "model"  # as Hugging Face wraps its bodies
    return ".".join(parts[: 2 if is_wrapped else 1])


def live_microbatches(row: tuple[Action, ...], sizes: Mapping[int, int]) -> dict[int, int]:
    """How many micro-batches of each stage wait for their backward when most bytes do.

    sizes: bytes that one micro-batch of each stage keeps; until the weight part, where the row has
    those, though some are free before.
    """
    frees = Kind.W if any(action.kind is Kind.W for action in row) else Kind.B
    live: Counter[int] = Counter()
    most, fullest = -1, dict(live)
    for action in row:
        if action.kind is Kind.F:
            live[action.stage] += 1
        total = sum(count * sizes.get(stage, 0) for stage, count in live.items())
        if total > most:
            most, fullest = total, dict(live)
        if action.kind is frees:
            live[action.stage] -= 1
    return fullest


def _region(path: str) -> str:
    """The child of the stage's module that a variable lies in, "" for none."""
    return path.partition(".")[0] if "." in path else ""


def _nbytes(tensor: Tensor) -> int:
    with torch.no_grad():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.nbytes
