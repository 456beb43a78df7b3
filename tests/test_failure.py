"""A rank that dies in a step ends the job with an error; nothing hangs."""

from __future__ import annotations

import subprocess
import sys
import time

SCRIPT = """
import os, signal, torch
import ilm_compile
from datetime import timedelta
from ilm_compile import models
torch.set_num_threads(1)
inputs = {name: ((1, 16), torch.int64) for name in ("input_ids", "labels")}
parallel = ilm_compile.parallelize(
    models.internlm2_tiny(), pp=2, num_microbatches=4, example_inputs=inputs,
    timeout=timedelta(seconds=20),
)
batch = {name: torch.zeros(4, 16, dtype=torch.int64) for name in inputs}
print("loss", float(parallel.execute_schedule(batch)), flush=True)
if os.environ["RANK"] == "1":
    calls = 0
    def die(*_):
        global calls
        calls += 1
        if calls == 2:  # in the second micro-batch of the second step
            os.kill(os.getpid(), signal.SIGKILL)
    for stage in parallel.stages:
        stage.module.register_forward_hook(die)
parallel.execute_schedule(batch)
print("unreachable", flush=True)
"""


def test_a_killed_rank_ends_the_job_with_an_error(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    start = time.monotonic()
    job = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
    assert job.returncode != 0
    assert job.stdout.count("loss") == 2
    assert "unreachable" not in job.stdout
    assert "exitcode  : -9" in job.stderr or "Signal 9" in job.stderr
    assert time.monotonic() - start < 100
