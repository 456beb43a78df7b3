"""Which models shard, and how well: `python -m benchmarks.sharding_table [--output FILE]`.

Small models of each architecture in float64, with casts to float32 promoted, against the plain
model on one device, in real processes over gloo. What the columns say:

nodes              calls in the captured graph
repeated           the share of weight bytes and of matrix-product FLOPs that every one of 4
                   tensor-parallel ranks has; the models are small (hidden size 64), and the share
                   of norms and biases falls as they grow
tp=2 and so on     largest relative error of the loss / of any gradient; ep: of mixtures of experts

FILE keeps what was measured: a further run goes on with what is missing in it.

InternLM3 is transformers' own mapping of its configuration to the Llama class, with 2 key-value
heads. Every other architecture of transformers: `python -m benchmarks.coverage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, keep_measuring, make_parser, markdown, read_rows
from ilm_compile.partitioning import partition
from ilm_compile.program.trace import trace
from tests.support.coverage import EXAMPLE, repeated_flops, repeated_weights
from tests.support.equality import Case, Errors, run_cases
from tests.support.promote import promoted_float32
from tests.support.world import World
from tests.support.zoo import EXPERTS_LISTED, LISTED, listed_model

LAYERS = 2
SHARES_AT = 4
TIMEOUT = 900.0  # seconds of one model under one plan
PLANS: dict[str, tuple[int, dict[str, int]]] = {
    "tp=2": (2, {"tp": 2}),
    "tp=4": (4, {"tp": 4}),
    "tp=2 x pp=2": (4, {"tp": 2, "pp": 2}),
    "cp=2": (2, {"cp": 2}),
    "ep=2": (2, {"ep": 2}),
}
EXPERTS = ("Mixtral", *EXPERTS_LISTED)  # the others have nothing that ep divides


@dataclass(frozen=True)
class Row:
    """A model of the table; errors by plan."""

    model: str
    nodes: int
    weights: float
    flops: float
    errors: dict[str, Errors]

    @staticmethod
    def read(saved: dict[str, Any]) -> Row:
        """Return the row that was saved as JSON."""
        return Row(**{**saved, "errors": {n: Errors(**e) for n, e in saved["errors"].items()}})


def measure(name: str, worlds: dict[int, World]) -> Row:
    """Return the row of one listed model."""
    with promoted_float32():
        model = listed_model(name, layers=LAYERS)
        traced = trace(model, example_inputs=EXAMPLE)
        program = partition(model, example_inputs=EXAMPLE, tp=SHARES_AT)
    errors = {}
    for plan, (size, keywords) in PLANS.items():
        if "ep" in keywords and name not in EXPERTS:
            continue
        run = worlds[size].run(run_cases, [Case(name, keywords)], timeout=TIMEOUT)
        [(_, found, _)] = run[0]
        errors[plan] = found
    nodes = len(list(traced.calls()))
    shares = repeated_weights(program), repeated_flops(traced, program)
    return Row(name, nodes, *shares, errors)


def table(rows: Sequence[Row]) -> str:
    """Return the table of listed models in Markdown."""
    lines = []
    for row in rows:
        found = map(row.errors.get, PLANS)
        errors = (f"{e.loss:.0e} / {e.gradient:.0e}" if e else "" for e in found)
        shares = (f"{share:.1%}" for share in (row.weights, row.flops))
        lines.append((row.model, row.nodes, *shares, *errors))
    return markdown(("model", "nodes", "weights repeated", "FLOPs repeated", *PLANS), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("sharding_table", __doc__)
    known = [*LISTED, *EXPERTS_LISTED]
    parser.add_argument("--only", action="append", choices=known, help="may be repeated")
    parser.add_argument("--output", type=Path, default=RESULTS / "sharding_table.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [Row.read(saved) for saved in read_rows(options.output)]
    done = {row.model for row in rows}
    left = [name for name in options.only or LISTED | EXPERTS_LISTED if name not in done]
    with World(2) as two, World(4) as four:
        found = (measure(name, {2: two, 4: four}) for name in left)
        settings = {"tp_of_shares": SHARES_AT, "layers": LAYERS}
        keep_measuring(options.output, rows, found, lambda row: row.model, **settings)
    print(table(rows))


if __name__ == "__main__":
    # What ranks are sent is pickled under the name of its module, which must not be "__main__".
    from benchmarks.sharding_table import main as run

    run()
