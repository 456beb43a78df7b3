"""Ranks compile alone, each with another order of its sets, and must come to the same program."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """
import ilm_compile
from tests.support.equality import EXAMPLE, make_model
for name in ("internlm2", "llama", "gpt2"):
    plan = {"tp": 2, "pp": 2, "checkpoint": 0.5}
    print(ilm_compile.partition(make_model(name), example_inputs=EXAMPLE, **plan).dump())
"""


def test_programs_do_not_depend_on_the_hash_seed() -> None:
    """Worlds do not show it: their ranks are forked from one process, which has one seed."""
    programs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert programs[0] == programs[1]
    assert programs[0].count("all_reduce") > 0 or programs[0].count("redistribute") > 0
