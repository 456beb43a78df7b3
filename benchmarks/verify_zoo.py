"""Proves plans of full-width models in one process: `python -m benchmarks.verify_zoo`.

Models of the widths of their default configurations, with 8 blocks, on the meta device. A cell is
the largest relative error of the loss, of any gradient and of any weight after one AdamW step, and
the seconds that `ilm_compile.verify` took, or why it failed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

import ilm_compile
from benchmarks.common import RESULTS, make_parser, save_json
from tests.support.zoo import LISTED, full_model

LAYERS = 8
ROWS, TOKENS = 1, 512  # of a micro-batch
PLANS: dict[str, dict[str, int]] = {
    "tp=8": {"tp": 8},
    "tp=4 x pp=4": {"tp": 4, "pp": 4},
    "tp=2 x pp=4 x dp=2, 2 chunks": {"tp": 2, "pp": 4, "dp": 2, "num_chunks": 2},
    "pp=8": {"pp": 8},
}


def prove(name: str, plan: str) -> dict[str, Any]:
    """Return what the proof of one listed model under one plan finds; no failure if it holds."""
    start = time.perf_counter()
    example = {key: ((ROWS, TOKENS), torch.int64) for key in ("input_ids", "labels")}
    model = full_model(name, layers=LAYERS)
    report = ilm_compile.verify(model, example_inputs=example, **PLANS[plan])
    return {
        **{"model": name, "plan": plan, "loss_error": report.max_loss_error},
        **{"gradient_error": report.max_grad_error, "weight_error": report.max_weight_error},
        "seconds": time.perf_counter() - start,
        "failure": "" if report.ok else report.failures[0],
    }


def words(cell: dict[str, Any]) -> str:
    """Return what the table says of a proof."""
    if cell["failure"]:
        return str(cell["failure"]).splitlines()[0][:120]
    largest = max(cell[f"{what}_error"] for what in ("loss", "gradient", "weight"))
    return f"{largest:.0e} ({cell['seconds']:.0f} s)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("verify_zoo", __doc__)
    parser.add_argument("--only", action="append", help="name of a model; may be repeated")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells = []
    print(f"| model | {' | '.join(PLANS)} |\n| --- |{' ---: |' * len(PLANS)}")
    for name in options.only or LISTED:
        row = [prove(name, plan) for plan in PLANS]
        print(f"| {name} | {' | '.join(map(words, row))} |", flush=True)
        cells += row
    total = sum(cell["seconds"] for cell in cells)
    failed = sum(bool(cell["failure"]) for cell in cells)
    print(f"\n{len(cells)} proofs, {failed} failed, {total:.0f} s in total")
    content = {"layers": LAYERS, "micro_batch": (ROWS, TOKENS), "seconds": total}
    save_json(RESULTS / "verify_zoo.json", content | {"cells": cells})


if __name__ == "__main__":
    main()
