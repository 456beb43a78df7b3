"""`make demo`: train one model twice, in four processes and in one, and compare.

The four processes run `examples/train_internlm2.py` under torchrun. The one process runs the same
model in a plain torch loop that shares nothing with the compiler: it is what four must equal.
"""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from safetensors.torch import load_file

from examples import train_internlm2 as example
from ilm_compile.models import InternLM2
from ilm_compile.runtime import (
    BatchIterator,
    ByteTokenizer,
    MetricsWriter,
    Progress,
    StepMetrics,
    adamw,
    lr_schedule,
)

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

OUT = Path("runs/demo")
NUM_PROCESSES = 4
PROMPTS = ("The for statement", "An object is")
LOSS_GOAL = 2.5
DIFFERENCE_GOAL = 1e-4


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two loss curves, one number per step; first and last: of the curve of many processes.

    last is the mean of the last ten steps, because one step sees two pages of text only.
    """

    single: list[float]
    parallel: list[float]

    @property
    def differences(self) -> list[float]:
        pairs = zip(self.single, self.parallel, strict=True)
        return [abs(b - a) / abs(a) for a, b in pairs]

    @property
    def first(self) -> float:
        return self.parallel[0]

    @property
    def last(self) -> float:
        tail = self.parallel[-10:]
        return sum(tail) / len(tail)

    @property
    def has_learned(self) -> bool:
        return self.last < LOSS_GOAL

    @property
    def is_equal(self) -> bool:
        return max(self.differences) <= DIFFERENCE_GOAL


def train_in_processes(out: Path, num_steps: int) -> None:
    """Run the example in NUM_PROCESSES processes; their output goes to this terminal."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": loopback,
        "CUDA_VISIBLE_DEVICES": "",  # the demo is of four processes, with or without four GPUs
    }
    launch = f"torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {NUM_PROCESSES}"
    command = [sys.executable, "-m", *launch.split(), "-m", example.__name__, str(out), str(num_steps)]
    subprocess.run(command, env=environment, check=True)


def train_in_one_process(out: Path, num_steps: int) -> None:
    """The reference: the untransformed model, the whole batch at once, no compiler."""
    model, data = example.make_model(), example.make_data()
    batches = BatchIterator(data, global_batch_size=example.GLOBAL_BATCH)
    optimizer = adamw(model.named_parameters(), lr=example.LR)
    scheduler = lr_schedule(optimizer, **example.lr_steps(num_steps))
    with MetricsWriter(out / "metrics.jsonl") as writer, Progress(num_steps) as progress:
        for step, batch in zip(range(1, num_steps + 1), batches, strict=False):
            start, lr = time.perf_counter(), scheduler.get_last_lr()[0]
            optimizer.zero_grad()
            loss = model(**batch)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), example.MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()
