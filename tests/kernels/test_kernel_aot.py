"""The benchmark that writes what the compiler made of each kernel."""

import json
from pathlib import Path

from tests.kernels.worker import Worker


def test_the_table_has_a_row_for_each_width_and_architecture(
    compiler: Worker, tmp_path: Path
) -> None:
    path = tmp_path / "kernel_aot.json"
    options = ["--only", "swiglu", "--arch", "80", "90", "--output", str(path)]
    compiler.call("benchmarks.kernel_aot:main", options)
    written = json.loads(path.read_text())
    rows = [(row["width"], row["report"]["arch"]) for row in written["kernels"]]
    assert rows == [(width, arch) for width in (7168, 11008, 14336) for arch in (80, 90)]
    for row in written["kernels"]:
        assert row["sample"] == "swiglu"
        assert row["report"]["registers"] > 0
