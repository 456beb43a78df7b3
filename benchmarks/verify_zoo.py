"""Proves plans of full-width models in one process: `python -m benchmarks.verify_zoo`.

Models of the widths of their default configurations, with 8 blocks, on the meta device. A cell is
the largest relative error of the loss, of any gradient and of any weight after one AdamW step, and
the seconds that `ilm_compile.verify` took, or why it failed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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


@dataclass(frozen=True)
class Cell:
    """What one plan's proof found; `failure` is empty if it holds."""

    model: str
    plan: str
    loss_error: float
    gradient_error: float
    weight_error: float
    seconds: float
    failure: str

    def __str__(self) -> str:
        if self.failure:
            return self.failure.splitlines()[0][:120]
        largest = max(self.loss_error, self.gradient_error, self.weight_error)
        return f"{largest:.0e} ({self.seconds:.0f} s)"


def prove(name: str, plan: str) -> Cell:
    """Return the proof of one listed model under one plan."""
    start = time.perf_counter()
    example = {key: ((ROWS, TOKENS), torch.int64) for key in ("input_ids", "labels")}
    model = full_model(name, layers=LAYERS)
    report = ilm_compile.verify(model, example_inputs=example, **PLANS[plan])
    seconds = time.perf_counter() - start
    errors = report.max_loss_error, report.max_grad_error, report.max_weight_error
    return Cell(name, plan, *errors, seconds, "" if report.ok else report.failures[0])


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("verify_zoo", __doc__)
    parser.add_argument("--only", action="append", help="name of a model; may be repeated")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(1)
    cells: list[Cell] = []
    print(f"| model | {' | '.join(PLANS)} |\n| --- |{' ---: |' * len(PLANS)}")
    for name in options.only or LISTED:
        row = [prove(name, plan) for plan in PLANS]
        print(f"| {name} | {' | '.join(map(str, row))} |", flush=True)
        cells += row
    total = sum(cell.seconds for cell in cells)
    failed = sum(bool(cell.failure) for cell in cells)
    print(f"\n{len(cells)} proofs, {failed} failed, {total:.0f} s in total")
    content = {"layers": LAYERS, "micro_batch": (ROWS, TOKENS), "seconds": total}
    save_json(RESULTS / "verify_zoo.json", content | {"cells": [asdict(cell) for cell in cells]})


if __name__ == "__main__":
    main()
