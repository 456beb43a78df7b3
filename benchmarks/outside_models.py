"""Models nobody here wrote, proved and trained: `python -m benchmarks.outside_models`.

Small models in float64: those of PyPI packages as they are, and public single-file models retyped.
Each is partitioned, proved by `ilm_compile.verify`, and takes five AdamW steps in four real
processes over gloo; loss of each step and all weights after the last are compared with plain
PyTorch's. What the columns say:

partition, proof   seconds, each in one process
loss, weights      largest relative error of a step's loss, of any weight after five steps

`pip install --no-deps -r benchmarks/outside/requirements.txt` installs what is not in [dev,hf].
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import nn

import ilm_compile
from benchmarks.common import (
    RESULTS,
    circumstances,
    last_line,
    make_parser,
    read_rows,
    save_json,
)
from benchmarks.outside import MODELS, Outside, entry_of
from benchmarks.outside.table import (
    HEADINGS,
    NOT_TRIED,
    Row,
    by_source,
    summary,
    table_line,
    without_folders,
)
from benchmarks.outside.train import STEPS, Trained, train_both
from ilm_compile.errors import IlmCompileError
from ilm_compile.proof.promote import promoted_float32
from tests.support.world import World, WorldError

SAVED = RESULTS / "outside_models.json"
TIMEOUT = 300.0  # seconds of one model's real run
PER_WORLD = 8  # models trained by the same processes: the threads of their groups stay


def measure(
    name: str, world: World, *, layout: str = "", proof: bool = True, train: bool = True
) -> Row:
    """Return the row of one model, without its proof or its training if those are not asked for."""
    entry = entry_of(name, layout)
    with promoted_float32():
        model = entry.build()
    start = time.perf_counter()
    refused = _refusal(entry, model)
    row = Row(
        name,
        entry.source,
        entry.layout,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        partition_s=time.perf_counter() - start,
        refused=refused,
        tolerance=entry.tolerance,
        refusal=entry.refusal,
        reason=entry.reason,
    )
    if proof and not refused:
        verdict, proof_s = _prove(entry, model)
        row = replace(row, proof=verdict, proof_s=proof_s)
    return replace(row, trained=_train(world, name, layout)) if train and not refused else row


def _refusal(entry: Outside, model: nn.Module) -> str:
    """Return why `partition` refuses the model, or nothing."""
    try:
        with promoted_float32():
            ilm_compile.partition(model, **entry.keywords)
    except IlmCompileError as error:
        return without_folders(f"{type(error).__name__}: {error}")
    except Exception as error:  # a fault of ours: the table goes on and says so
        return without_folders(f"a fault, {type(error).__name__}: {error}")
    return ""


def _prove(entry: Outside, model: nn.Module) -> tuple[str, float]:
    start = time.perf_counter()
    with promoted_float32():  # the very program that is trained
        report = ilm_compile.verify(model, dp=entry.plan.dp, **entry.keywords)
    verdict = "equal" if report.ok else without_folders(report.failures[0])
    return verdict, time.perf_counter() - start


def _train(world: World, name: str, layout: str) -> Trained:
    try:
        found = world.run(train_both, name, layout, timeout=TIMEOUT)
    except WorldError as error:
        return Trained(refused=without_folders(f"the run failed: {last_line(error)}"))
    return next((one for one in found if one is not None and one.refused), found[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("outside_models", __doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models of the table")
    parser.add_argument("--layout", default="", help="another plan for all, by its name")
    parser.add_argument("--no-proof", action="store_true", help="partition and train only")
    parser.add_argument("--no-training", action="store_true", help="partition and prove only")
    parser.add_argument("--saved", action="store_true", help="print the saved results and stop")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--json", action="store_true", help="write benchmarks/results too")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(MODELS))
        return 0
    print(table_line(HEADINGS), table_line(["---"] * len(HEADINGS)), sep="\n")
    if options.saved:
        saved = [Row.read(row) for row in read_rows(SAVED)]
        print("\n".join(table_line(row.cells()) for row in saved))
        return _conclude(saved)
    torch.set_num_threads(1)
    rows: list[Row] = []
    names = list(options.only or MODELS)
    for first in range(0, len(names), PER_WORLD):
        with World(4) as world:
            for name in names[first : first + PER_WORLD]:
                row = measure(
                    *(name, world),
                    layout=options.layout,
                    proof=not options.no_proof,
                    train=not options.no_training,
                )
                print(table_line(row.cells()), flush=True)
                rows.append(row)
                if options.json:
                    save_rows([row])
    return _conclude(rows)


def _conclude(rows: Sequence[Row]) -> int:
    print(f"\n{summary(rows)}\n")
    print("\n".join(by_source(rows)))
    return 0 if all(row.ok for row in rows) else 1


def save_rows(rows: Sequence[Row]) -> None:
    """Write what was measured, with commit and date, beside what was not measured this time."""
    kept = {old["model"]: old for old in read_rows(SAVED)}
    now = {name: circumstances()[name] for name in ("commit", "date", "load_average")}
    for row in rows:
        new, old = asdict(row), kept.get(row.model, {})
        measured = old.get("measured", {}) if old.get("plan") == row.plan else {}
        parts = {"proof": row.proof != NOT_TRIED, "trained": row.trained is not None}
        for part, is_new in parts.items():
            if is_new:
                measured[part] = now
            elif part in measured and not row.refused:
                new |= {name: old[name] for name in old if name.startswith(part)}
        found = {"ok": Row.read(new).ok, "measured": measured | {"partition": now}}
        kept[row.model] = new | found
    save_json(SAVED, {"steps": STEPS, "rows": [kept[name] for name in MODELS if name in kept]})


if __name__ == "__main__":
    # What ranks are sent is pickled under the name of its module, which must not be "__main__".
    from benchmarks.outside_models import main as run

    sys.exit(run())
