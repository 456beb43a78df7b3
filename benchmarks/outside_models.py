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
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

import ilm_compile
from benchmarks.common import RESULTS, save_json
from benchmarks.outside import MODELS, Outside, entry_of
from benchmarks.outside.train import Trained, train_both
from ilm_compile.errors import IlmCompileError
from ilm_compile.verify.promote import promoted_float32
from tests.support.world import World, WorldError

HEADINGS = ("model", "source", "parameters", "plan", "partition", "proof", "loss", "weights", "")
TIMEOUT = 300.0  # seconds of one model's real run
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
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything that was not refused agreed."""
        errors = (self.trained.loss_error, self.trained.weight_error)
        close = all(error <= self.tolerance for error in errors)
        return bool(self.refused) or (
            close and self.proof in ("equal", "-") and not self.trained.missing
        )

    def cells(self) -> list[str]:
        if self.refused:
            return self._head("refused", "", "", "", _short(self.refused))
        proof = f"{self.proof}, {self.proof_s:.1f} s" if self.proof == "equal" else "NOT PROVED"
        proof = "-" if self.proof == "-" else proof
        failed = "" if self.proof in ("equal", "-") else self.proof
        notes = [failed, self.trained.refused, self.reason]
        notes += [f"state dict lacks {', '.join(self.trained.missing)}"] * bool(
            self.trained.missing
        )
        if not self.ok and not math.isnan(self.trained.weight_error):
            notes.append(f"largest in {self.trained.worst}")
        errors = (f"{e:.0e}" for e in (self.trained.loss_error, self.trained.weight_error))
        note = _short("; ".join(filter(None, notes)))
        return self._head(f"{self.partition_s:.1f} s", proof, *errors, note)

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
        refused = f"CRASH {type(error).__name__}: {error}"
    partition_s = time.perf_counter() - start
    verdict, proof_s, trained = "-", 0.0, Trained()
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


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.list:
        print("\n".join(MODELS))
        return
    torch.set_num_threads(1)
    print(table_line(HEADINGS))
    print(table_line(["---"] * len(HEADINGS)))
    rows: list[Row] = []
    with World(4) as world:
        for name in options.only or MODELS:
            rows.append(measure(name, world, layout=options.layout, proof=not options.no_proof))
            print(table_line(rows[-1].cells()), flush=True)
    refused = sum(bool(row.refused) for row in rows)
    failed = [row.model for row in rows if not row.ok]
    equal = len(rows) - refused - len(failed)
    print(f"\n{len(rows)} models: {equal} equal, {refused} refused, {len(failed)} wrong {failed}")
    if options.json:
        content = {"steps": 5, "rows": [asdict(row) | {"ok": row.ok} for row in rows]}
        save_json(RESULTS / "outside_models.json", content)


if __name__ == "__main__":
    # What ranks are sent is pickled under the name of its module, which must not be "__main__".
    from benchmarks.outside_models import main as run

    run()
