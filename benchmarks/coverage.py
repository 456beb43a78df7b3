"""Every causal language model of transformers, tried small: `python -m benchmarks.coverage`.

Is it captured, is it equal at tp=2 and tp=4 (ranks emulated in one process, float64), how much of
it does every rank repeat, and if it is not equal, why not. The table goes to standard output, with
the sentence of the README below it; all numbers to benchmarks/results/coverage.json. What became of
an architecture is one of

equal      loss and every gradient to 1e-10
refused    with a `TraceError`, before anything was computed
unusable   transformers itself cannot make it small, or run it on text alone
wrong      anything else: a bug here

--again tries only those that are not equal in the results, and keeps the others as they are.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.common import RESULTS, make_parser, markdown, save_json
from tests.support.coverage import BOUND, TIME_LIMIT, Coverage, Sharded, cover_all
from tests.support.zoo import architectures

FILE = RESULTS / "coverage.json"
SIZES = (2, 4)
LONGEST = 200  # characters of a reason in the table; the whole is in the JSON


def table(found: Sequence[Coverage]) -> str:
    """Return the table, and the totals."""
    lines = []
    for row in found:
        shares = error = ""
        if row.sharded:
            weights, flops = (max(getattr(s, n) for s in row.sharded) for n in ("weights", "flops"))
            shares = f"{weights:.1%}, {flops:.1%}"
            error = f"{max(max(s.loss_error, s.gradient_error) for s in row.sharded):.0e}"
        cells = (row.architecture, row.outcome, row.nodes or "", shares, error)
        lines.append((*cells, row.reason[:LONGEST]))
    counts = Counter(row.outcome for row in found).most_common()
    totals = ", ".join(f"{n} {outcome}" for outcome, n in counts)
    headings = ("architecture", "outcome", "nodes", "weights, FLOPs repeated", "largest error")
    return f"{markdown((*headings, 'why'), lines)}\n\n{len(found)} architectures: {totals}"


def sentence(content: dict[str, Any]) -> str:
    """Return what the README says of the results, in one line."""
    rows = load(content)
    counts = Counter(row.outcome for row in rows)
    shares = [
        max(s.weights, s.flops) for row in rows if row.outcome == "equal" for s in row.sharded
    ]
    sizes = " and ".join(f"tp={size}" for size in content["tp"])
    parts = [
        f"of the {len(rows)} causal language model classes of transformers "
        f"{content['transformers']}, tried small, {counts['equal']} are captured, sharded at "
        f"{sizes} and equal to {BOUND:g} in loss and every gradient (one-process emulation), each "
        f"with at most {max(shares):.1%} of weights or FLOPs repeated",
        f"{counts['refused']} are refused with a reason",
        f"{counts['unusable']} transformers itself cannot make small or run on text alone",
        *([f"{counts['wrong']} are wrong"] if counts["wrong"] else []),
    ]
    return f"Not only these: {'; '.join(parts)} (`python -m benchmarks.coverage`)."


def load(content: dict[str, Any]) -> list[Coverage]:
    """Return the rows of results that were read from their file."""
    return [
        Coverage(**{**row, "sharded": [Sharded(**each) for each in row["sharded"]]})
        for row in content["architectures"]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("coverage", __doc__)
    parser.add_argument("--again", action="store_true", help="only what is not equal so far")
    parser.add_argument("--only", action="append", help="an architecture; may be repeated")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds per architecture")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kept = load(json.loads(FILE.read_text())) if options.again or options.only else []
    wanted = options.only or [row.architecture for row in kept if row.outcome != "equal"]
    found = {row.architecture: row for row in kept}
    for row in cover_all(wanted or architectures(), SIZES, limit_s=options.limit):
        found[row.architecture] = row
        print(f"{row.architecture}: {row.outcome} ({row.seconds:.0f} s)", file=sys.stderr)
    rows = sorted(found.values(), key=lambda row: row.architecture.lower())
    release = ".".join(version("transformers").split(".")[:2])
    content = {"transformers": release, "tp": SIZES, "tried": wanted, "architectures": rows}
    save_json(FILE, content)
    print(table(rows), "", sentence(json.loads(FILE.read_text())), sep="\n")


if __name__ == "__main__":
    main()
