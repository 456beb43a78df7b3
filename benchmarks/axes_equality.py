"""Whether plans train as one device does: `python -m benchmarks.axes_equality --output FILE`.

Small dense models under context parallelism and mixtures of experts under expert parallelism, alone
and beside tensor, pipeline and data parallelism, each in real processes over gloo, in float64 with
casts to float32 promoted and with micro-batches of unequal numbers of targets. Against the model on
one device:

loss, gradients    largest relative error in one step, of the loss, of any parameter's gradient
weights            of any weight after ten AdamW steps with gradient clipping

FILE keeps what was measured: a further run goes on with what is missing in it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import ilm_compile
from benchmarks.common import RESULTS, keep_measuring, last_line, make_parser, markdown, read_rows
from tests.support.axes import MODELS, cases
from tests.support.equality import EXAMPLE, Case, make_model
from tests.support.promote import promoted_float32
from tests.support.traced import traced_once
from tests.support.training import train_and_compare
from tests.support.world import World, WorldError

STEPS = 10
BOUND = 1e-10
WEIGHTS_BOUND = 1e-8
TIMEOUT = 600.0  # seconds of one case


@dataclass(frozen=True)
class Row:
    """A model under one plan: relative errors, or why there are none."""

    axis: str
    model: str
    plan: str
    loss: float = 0.0
    gradient: float = 0.0
    worst: str = ""
    weights: float = 0.0
    failure: str = ""

    @property
    def is_equal(self) -> bool:
        """Whether the plan trains as one device does."""
        is_close = max(self.loss, self.gradient) <= BOUND and self.weights <= WEIGHTS_BOUND
        return is_close and not self.failure

    def __str__(self) -> str:
        if self.failure:
            return self.failure
        return f"{self.loss:.0e} / {self.gradient:.0e} / {self.weights:.0e}"


def name_of(case: Case) -> str:
    """Return the sizes of a case's axes as the table has them."""
    sizes = {n: size for n, size in case.plan.items() if n != "num_microbatches"}
    return " x ".join(f"{n}={size}" for n, size in {**sizes, "dp": case.dp}.items() if size > 1)


def measure(axis: str, case: Case, world: World) -> Row:
    """Return what one case in `world` finds."""
    names = axis, case.model, name_of(case)
    try:
        found = world.run(train_and_compare, case, STEPS, timeout=TIMEOUT)[0]
    except WorldError as error:
        return Row(*names, failure=last_line(error))
    first = found.first
    return Row(*names, first.loss, first.gradient, first.worst, found.weights)


def measure_all(only: Sequence[str], done: set[tuple[str, str, str]]) -> Iterator[Row]:
    """Yield the rows that are not `done`, those of few processes first.

    A model is traced once, here: the processes that it runs in are forked with its graph.
    """
    for axis, models in MODELS.items():
        by_size = [cases(model, axis) for model in models if not only or model in only]
        for size in sorted({size for each in by_size for size in each}):
            for each in by_size:
                left = [c for c in each[size] if (axis, c.model, name_of(c)) not in done]
                if left:
                    with promoted_float32(), traced_once((left[0].model, False)):
                        ilm_compile.partition(make_model(left[0].model), example_inputs=EXAMPLE)
                    with World(size, method="fork") as world:
                        yield from (measure(axis, case, world) for case in left)


def summary(rows: Sequence[Row]) -> str:
    """Return the largest errors of each axis and plan in Markdown, and what is not equal."""
    lines = []
    for axis, plan in dict.fromkeys((row.axis, row.plan) for row in rows):
        these = [row for row in rows if (row.axis, row.plan) == (axis, plan)]
        ran = [row for row in these if not row.failure]
        worst = (
            f"{max((getattr(row, name) for row in ran), default=0.0):.0e}"
            for name in ("loss", "gradient", "weights")
        )
        lines.append((plan, len(these), sum(row.is_equal for row in these), *worst))
    table = markdown(("plan", "models", "equal", "loss", "gradients", "weights"), lines)
    return "\n".join([table, *(f"{r.model}, {r.plan}: {r}" for r in rows if not r.is_equal)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("axes_equality", __doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "axes_equality.json")
    known = [model for models in MODELS.values() for model in models]
    parser.add_argument("--only", nargs="+", choices=known, metavar="MODEL", help="some models")
    parser.add_argument("--again", action="store_true", help="measure what failed once more")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [Row(**saved) for saved in read_rows(options.output)]
    rows = [row for row in rows if row.is_equal or not options.again]
    done = {(row.axis, row.model, row.plan) for row in rows}
    found = measure_all(options.only or (), done)
    keep_measuring(options.output, rows, found, lambda row: f"{row.model}, {row.plan}", steps=STEPS)
    print(summary(rows))
    return 0 if all(row.is_equal for row in rows) else 1


if __name__ == "__main__":
    # What ranks are sent is pickled under the name of its module, which must not be "__main__".
    from benchmarks.axes_equality import main as run

    sys.exit(run())
