"""How long the search for a plan takes: `python -m benchmarks.search_time`.

Four models (7B and 70B dense, one of 128 experts, InternLM2-20B with 128k tokens of context) on 8
to 16,384 H100, of which each has a row: the plans that fit, the processor seconds of the search
from the sizes of the model on, the least of several, and the plan predicted fastest. Tokens of a
step are 4M, or a sequence for each device where that is more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, make_parser, save_json, show_table
from ilm_compile.cost.sizes import ModelSizes
from ilm_compile.planner import search

TOKENS = 4 * 2**20  # of a step, or as many as give each device a sequence
GPUS = (8, 64, 1024, 16384)


_EXPERTS = {"experts": 128, "top_k": 8, "head_dim": 128}
_SMALL = ModelSizes(hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=92544)
_LARGE = ModelSizes(hidden=8192, layers=80, heads=64, kv_heads=8, ffn=28672, vocab=128256)
_MIXED = ModelSizes(hidden=2048, layers=48, heads=32, kv_heads=4, ffn=768, vocab=151936, **_EXPERTS)
_LONG = ModelSizes(hidden=6144, layers=48, heads=48, kv_heads=8, ffn=16384, vocab=92544)
# Sizes, and tokens of context.
MODELS = {
    "7B": (_SMALL, 4096),
    "70B": (_LARGE, 4096),
    "128 experts": (_MIXED, 4096),
    "InternLM2-20B, 128k": (_LONG, 131072),
}


def run(name: str, gpus: int, *, repeats: int) -> dict[str, Any]:
    """Search, and search again. best: what was predicted fastest, or why nothing."""
    sizes, seq = MODELS[name]
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        found = search(sizes, gpus, "h100", tokens_per_batch=max(TOKENS, gpus * seq), seq=seq)
        seconds.append(time.process_time() - start)
    best = found.candidates[0] if found.candidates else None
    return {
        **{"model": name, "gpus": gpus, "plans": len(found.candidates), "seconds": min(seconds)},
        "best": "nothing fits" if best is None else best.name,
        "step_s": None if best is None else best.time.total,
        "mfu": None if best is None else best.mfu,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, print, and write."""
    parser = make_parser("search_time", __doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "search_time.json")
    options = parser.parse_args(arguments)
    rows = [run(name, gpus, repeats=options.repeats) for name in MODELS for gpus in options.gpus]
    lines = []
    for row in rows:
        step = "" if row["step_s"] is None else f"{row['step_s']:.2f}"
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        figures = (f"{row['gpus']:,}", f"{row['plans']:,}", f"{row['seconds']:.2f}", step, mfu)
        lines.append((row["model"], *figures, row["best"]))
    show_table(None, ("model", "GPUs", "plans", "CPU s", "step s", "MFU", "fastest"), lines)
    save_json(options.output, {"rows": rows})


if __name__ == "__main__":
    main()
