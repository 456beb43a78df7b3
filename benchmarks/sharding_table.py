"""Which models shard, and how well: `python -m benchmarks.sharding_table`.

Small models of each architecture in float64, with casts to float32 promoted, against the plain
model on one device, in real processes over gloo. What the columns say:

nodes              calls in the captured graph
repeated           the share of weight bytes and of matrix-product FLOPs that every one of 4
                   tensor-parallel ranks has; the models are small (hidden size 64), and the share
                   of norms and biases falls as they grow
tp=2 and so on     largest relative error of the loss / of any gradient

With --all, every causal language model of transformers, its ranks emulated in one process: is it
captured, is it equal at tp=2 and tp=4, and if not, why. InternLM3 is transformers' own mapping of
its configuration to the Llama class, with 2 key-value heads.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import RESULTS, save_json
from ilm_compile.compile import partition
from ilm_compile.program.trace import trace
from tests.support.coverage import (
    EXAMPLE,
    TIME_LIMIT,
    Coverage,
    cover_all,
    repeated_flops,
    repeated_weights,
)
from tests.support.equality import Case, Errors, run_cases
from tests.support.promote import promoted_float32
from tests.support.world import World
from tests.support.zoo import LISTED, architectures, listed_model

LAYERS = 2
SHARES_AT = 4
LONGEST = 200  # characters of a reason in the table; the whole is in the JSON
SIZES = (2, 4)
PLANS: dict[str, tuple[int, dict[str, int]]] = {
    "tp=2": (2, {"tp": 2}),
    "tp=4": (4, {"tp": 4}),
    "tp=2 x pp=2": (4, {"tp": 2, "pp": 2}),
}


@dataclass(frozen=True)
class Row:
    """A model of the table; errors by plan."""

    model: str
    nodes: int
    weights: float
    flops: float
    errors: dict[str, Errors]


def measure(name: str, worlds: dict[int, World]) -> Row:
    """Return the row of one listed model."""
    with promoted_float32():
        model = listed_model(name, layers=LAYERS)
        traced = trace(model, example_inputs=EXAMPLE)
        program = partition(model, example_inputs=EXAMPLE, tp=SHARES_AT)
    errors = {}
    for plan, (size, keywords) in PLANS.items():
        [(_, found, _)] = worlds[size].run(run_cases, [Case(name, keywords)])[0]
        errors[plan] = found
    nodes = len(list(traced.calls()))
    shares = repeated_weights(program), repeated_flops(traced, program)
    return Row(name, nodes, *shares, errors)


def table(rows: Sequence[Row]) -> str:
    """Return the table of listed models in Markdown."""
    headings = ["model", "nodes", "weights repeated", "FLOPs repeated", *PLANS]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    for row in rows:
        errors = (f"{e.loss:.0e} / {e.gradient:.0e}" for e in row.errors.values())
        shares = (f"{share:.1%}" for share in (row.weights, row.flops))
        lines.append([row.model, str(row.nodes), *shares, *errors])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def coverage_table(found: Sequence[Coverage]) -> Iterator[str]:
    """Yield the lines of the systematic coverage, and the totals."""
    headings = ["architecture", "outcome", "nodes", "weights, FLOPs repeated", "largest error"]
    yield f"| {' | '.join([*headings, 'why'])} |"
    yield "| --- | --- | ---: | ---: | ---: | --- |"
    for row in found:
        shares = [f"{max(s.weights for s in row.sharded):.1%}" if row.sharded else ""]
        shares += [f"{max(s.flops for s in row.sharded):.1%}" if row.sharded else ""]
        errors = [max(s.loss_error, s.gradient_error) for s in row.sharded]
        error = f"{max(errors):.0e}" if errors else ""
        cells = (row.architecture, row.outcome, str(row.nodes or ""), ", ".join(shares).strip(", "))
        yield f"| {' | '.join((*cells, error, row.reason[:LONGEST]))} |"
    counts = Counter(row.outcome for row in found)
    yield ""
    yield f"{len(found)} architectures: " + ", ".join(f"{n} {o}" for o, n in counts.most_common())


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.sharding_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--all", action="store_true", help="the systematic coverage instead")
    parser.add_argument("--only", action="append", help="a model or architecture; may be repeated")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds per architecture")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(1)
    content: dict[str, Any]
    if options.all:
        found = []
        for row in cover_all(options.only or architectures(), SIZES, limit_s=options.limit):
            found.append(row)
            print(f"{row.architecture}: {row.outcome} ({row.seconds:.0f} s)", file=sys.stderr)
        print("\n".join(coverage_table(found)))
        content = {"tp": SIZES, "architectures": found}
    else:
        with World(2) as two, World(4) as four:
            rows = [measure(name, {2: two, 4: four}) for name in options.only or LISTED]
        print(table(rows))
        content = {"tp_of_shares": SHARES_AT, "layers": LAYERS, "models": rows}
    name = "coverage" if options.all else "sharding_table"
    save_json(RESULTS / f"{name}.json", content)


if __name__ == "__main__":
    # What ranks are sent is pickled under the name of its module, which must not be "__main__".
    from benchmarks.sharding_table import main as run

    run()
