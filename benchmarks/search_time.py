"""How long the search for a plan takes: `python -m benchmarks.search_time`.

Four models (7B and 70B dense, one of 128 experts, InternLM2-20B with 128k tokens of context) on 8
to 16,384 H100, of which each has a row: the plans that fit, the processor seconds of the search
from the sizes of the model on, the least of several, and the plan predicted fastest. Tokens of a
step are 4M, or a sequence for each device where that is more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.common import RESULTS, make_console, make_parser, save_json
from ilm_compile.cost.sizes import ModelSizes
from ilm_compile.planner import Search, search

TOKENS = 4 * 2**20  # of a step, or as many as give each device a sequence
GPUS = (8, 64, 1024, 16384)


@dataclass(frozen=True, slots=True)
class Model:
    """A model and its context."""

    sizes: ModelSizes
    seq: int


MODELS = {
    "7B": Model(
        ModelSizes(hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=92544), 4096
    ),
    "70B": Model(
        ModelSizes(hidden=8192, layers=80, heads=64, kv_heads=8, ffn=28672, vocab=128256), 4096
    ),
    "128 experts": Model(
        ModelSizes(
            **{"hidden": 2048, "layers": 48, "heads": 32, "kv_heads": 4, "ffn": 768},
            **{"vocab": 151936, "experts": 128, "top_k": 8, "head_dim": 128},
        ),
        4096,
    ),
    "InternLM2-20B, 128k": Model(
        ModelSizes(hidden=6144, layers=48, heads=48, kv_heads=8, ffn=16384, vocab=92544), 131072
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One search. seconds: of the processor. best: what was predicted fastest, or why nothing."""

    model: str
    gpus: int
    plans: int
    seconds: float
    best: str
    step_s: float | None
    mfu: float | None


def run(name: str, model: Model, gpus: int, *, repeats: int) -> Row:
    """Search, and search again."""
    tokens = max(TOKENS, gpus * model.seq)
    seconds, found = [], None
    for _ in range(repeats):
        start = time.process_time()
        found = search(model.sizes, gpus, "h100", tokens_per_batch=tokens, seq=model.seq)
        seconds.append(time.process_time() - start)
    assert found is not None
    return _row(name, found, min(seconds))


def _row(name: str, found: Search, seconds: float) -> Row:
    best = found.candidates[0] if found.candidates else None
    return Row(
        model=name,
        gpus=found.question.gpus,
        plans=len(found.candidates),
        seconds=seconds,
        best="nothing fits" if best is None else best.name,
        step_s=None if best is None else best.time.total,
        mfu=None if best is None else best.mfu,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, print, and write."""
    parser = make_parser("search_time", __doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "search_time.json")
    options = parser.parse_args(arguments)
    rows = [
        run(name, model, gpus, repeats=options.repeats)
        for name, model in MODELS.items()
        for gpus in options.gpus
    ]
    table = Table("model", "GPUs", "plans", "CPU s", "step s", "MFU", "fastest")
    for row in rows:
        step = "" if row.step_s is None else f"{row.step_s:.2f}"
        mfu = "" if row.mfu is None else f"{row.mfu:.1%}"
        figures = (f"{row.gpus:,}", f"{row.plans:,}", f"{row.seconds:.2f}", step, mfu)
        table.add_row(row.model, *figures, row.best)
    make_console().print(table)
    save_json(options.output, {"rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
