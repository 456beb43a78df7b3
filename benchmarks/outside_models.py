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

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import ilm_compile
from benchmarks.common import RESULTS, circumstances, save_json
from benchmarks.outside import MODELS, Outside, entry_of
from benchmarks.outside.train import STEPS, Trained, train_both
from ilm_compile.errors import IlmCompileError
from ilm_compile.verify.promote import promoted_float32
from tests.support.world import World, WorldError

HEADINGS = ("model", "source", "parameters", "plan", "partition", "proof", "loss", "weights", "")
TIMEOUT = 300.0  # seconds of one model's real run
PER_WORLD = 8  # models trained by the same processes: the threads of their groups stay
NOT_TRIED = "-"
LONGEST = 160  # characters of a reason in the table; the whole is in the JSON


@dataclass(frozen=True)
class Row:
    """One model under its plan. `refused` says why `partition` did not take it, if so."""

    model: str
    source: str
    plan: str
    parameters: int
    partition_s: float
    proof: str  # "equal", or the first failure
    proof_s: float
    trained: Trained
    refused: str
    tolerance: float
    refusal: str = ""  # why it is right that it is refused, if so
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is proved and trains alike, or is refused as it must be."""
        if self.refused or self.refusal:
            return bool(self.refused and self.refusal)
        return self.proof in ("equal", NOT_TRIED) and self.trained.agrees(self.tolerance)

    def cells(self) -> list[str]:
        """Return the line of the table, as `HEADINGS` names its columns."""
        if self.refused:
            note = self.refusal or f"WRONGLY: {self.refused}"
            return self._head("refused", "", "", "", _short(note))
        is_proved = self.proof in ("equal", NOT_TRIED)
        proof = f"{self.proof}, {self.proof_s:.1f} s" if self.proof == "equal" else self.proof
        errors = (self.trained.loss_error, self.trained.weight_error)
        return self._head(
            f"{self.partition_s:.1f} s",
            proof if is_proved else "NOT PROVED",
            *("" if error is None else f"{error:.0e}" for error in errors),
            _short("; ".join(self._notes(is_proved))),
        )

    def _notes(self, is_proved: bool) -> Iterator[str]:
        if not is_proved:
            yield self.proof
        if self.trained.refused:
            yield self.trained.refused
        if self.trained.missing:
            yield f"state dict lacks {', '.join(self.trained.missing)}"
        if self.trained.worst and not self.trained.agrees(self.tolerance):
            yield f"largest in {self.trained.worst}"
        if self.reason:
            yield self.reason

    def _head(self, *rest: str) -> list[str]:
        return [self.model, self.source, f"{self.parameters:,}", self.plan, *rest]


def _short(text: str) -> str:
    first = " ".join(text.split())
    return first if len(first) <= LONGEST else first[: LONGEST - 3] + "..."


def measure(name: str, world: World, *, layout: str = "", proof: bool = True) -> Row:
    """Return the row of one model."""
    entry = entry_of(name, layout)
    with promoted_float32():
        model = entry.build()
    parameters = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    refused = ""
    try:
        with promoted_float32():
            ilm_compile.partition(
                model, example_inputs=entry.example(), loss_fn=entry.loss_fn, **entry.plan.keywords
            )
    except IlmCompileError as error:
        refused = f"{type(error).__name__}: {error}"
    except Exception as error:  # a fault of ours: the table goes on and says so
        refused = f"a fault, {type(error).__name__}: {error}"
    partition_s = time.perf_counter() - start
    verdict, proof_s, trained = NOT_TRIED, 0.0, Trained()
    if not refused:
        if proof:
            verdict, proof_s = _prove(entry, model)
        trained = _train(world, name, layout)
    return Row(
        name,
        entry.source,
        entry.layout,
        parameters,
        partition_s,
        verdict,
        proof_s,
        trained,
        refused,
        entry.tolerance,
        entry.refusal,
        entry.reason,
    )


def _prove(entry: Outside, model: torch.nn.Module) -> tuple[str, float]:
    start = time.perf_counter()
    report = ilm_compile.verify(
        model,
        dp=entry.plan.dp,
        example_inputs=entry.example(),
        loss_fn=entry.loss_fn,
        **entry.plan.keywords,
    )
    return "equal" if report.ok else report.failures[0], time.perf_counter() - start


def _train(world: World, name: str, layout: str) -> Trained:
    try:
        found = world.run(train_both, name, layout, timeout=TIMEOUT)
    except WorldError as error:
        last = [line for line in str(error).splitlines() if line.strip()][-1]
        return Trained(refused=f"the run failed: {last}")
    return next((one for one in found if one is not None and one.refused), found[0])


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.outside_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models of the table")
    parser.add_argument("--layout", default="", help="another plan for all, by its name")
    parser.add_argument("--no-proof", action="store_true", help="partition and train only")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--json", action="store_true", help="write benchmarks/results too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.list:
        print("\n".join(MODELS))
        return 0
    torch.set_num_threads(1)
    print(table_line(HEADINGS))
    print(table_line(["---"] * len(HEADINGS)))
    rows: list[Row] = []
    names = list(options.only or MODELS)
    for first in range(0, len(names), PER_WORLD):
        with World(4) as world:
            for name in names[first : first + PER_WORLD]:
                row = measure(name, world, layout=options.layout, proof=not options.no_proof)
                print(table_line(row.cells()), flush=True)
                rows.append(row)
                if options.json:
                    save_rows([row])
    print(f"\n{summary(rows)}")
    return 0 if all(row.ok for row in rows) else 1


def summary(rows: Sequence[Row]) -> str:
    """Return the counts, and the names of those that are neither equal nor rightly refused."""
    refused = sum(row.ok and bool(row.refused) for row in rows)
    failed = [row.model for row in rows if not row.ok]
    equal = len(rows) - refused - len(failed)
    text = f"{len(rows)} models: {equal} equal, {refused} rightly refused, {len(failed)} failed"
    return f"{text}: {'; '.join(failed)}" if failed else text


def save_rows(rows: Sequence[Row]) -> None:
    """Write the rows, each with its commit and date, beside those of models not measured now."""
    path = RESULTS / "outside_models.json"
    kept = {row["model"]: row for row in _read(path)}
    now = {name: circumstances()[name] for name in ("commit", "date", "load_average")}
    kept |= {row.model: asdict(row) | {"ok": row.ok, "measured": now} for row in rows}
    save_json(path, {"steps": STEPS, "rows": [kept[name] for name in MODELS if name in kept]})


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


if __name__ == "__main__":
    # What ranks are sent is pickled under the name of its module, which must not be "__main__".
    from benchmarks.outside_models import main as run

    sys.exit(run())
