"""`make demo` or `ilm-compile demo`: train one model in four processes and in one, and compare.

The four processes run `examples/train_internlm2.py` under torchrun. The one process runs the same
model in a plain torch loop that knows nothing of the compiler: it is what the four must equal.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file
from torch import nn

from ilm_compile.examples import train_internlm2 as example
from ilm_compile.runtime import ByteTokenizer, MetricsWriter, Progress, StepMetrics, adamw

NUM_PROCESSES = 4
LOSS_GOAL = 2.5
DIFFERENCE_GOAL = 1e-4
METRICS = "metrics.jsonl"
PROMPTS = ("The for statement", "An object is")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two loss curves, a number for each step."""

    single: list[float]
    parallel: list[float]

    @property
    def differences(self) -> list[float]:
        """Relative to the single process."""
        pairs = zip(self.single, self.parallel, strict=True)
        return [abs(b - a) / abs(a) for a, b in pairs]

    @property
    def final_loss(self) -> float:
        """Of the processes, the mean of the last ten steps: one step sees only a page of text."""
        tail = self.parallel[-10:]
        return sum(tail) / len(tail)


def train_in_processes(out: Path, num_steps: int) -> None:
    """Run the example in NUM_PROCESSES processes; what they print appears in this terminal."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        # Nothing leaves this machine.
        "GLOO_SOCKET_IFNAME": next(n for _, n in socket.if_nameindex() if n.startswith("lo")),
        # Processes of one kind everywhere, however many GPUs there are.
        "CUDA_VISIBLE_DEVICES": "",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(NUM_PROCESSES)]
    script = ["-m", example.__name__, "--out", str(out), "--steps", str(num_steps)]
    subprocess.run(torchrun + script, env=environment, check=True)


def train_in_one_process(out: Path, num_steps: int) -> None:
    """The reference: the model as it was written, the whole batch at once, a plain loop."""
    model = example.make_model()
    optimizer = adamw(model.named_parameters(), lr=example.LR)
    scheduler = example.learning_rate(optimizer, num_steps)
    batches = example.make_batches()
    with MetricsWriter(out / METRICS) as writer, Progress(num_steps) as progress:
        for step in range(1, num_steps + 1):
            start, batch, lr = time.perf_counter(), next(batches), optimizer.param_groups[0]["lr"]
            optimizer.zero_grad()
            loss = model(**batch)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), example.MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()
            metrics = StepMetrics.measured(
                step=step,
                loss=loss.item(),
                grad_norm=grad_norm.item(),
                lr=lr,
                num_tokens=batch["input_ids"].numel(),
                model_flops=math.nan,
                step_time_s=time.perf_counter() - start,
                world_size=1,
            )
            writer.write(metrics)
            progress.update(metrics)


def compare(single: Path, parallel: Path) -> Comparison:
    """Read the metrics that the two runs wrote."""
    lines = ((run / METRICS).read_text().splitlines() for run in (single, parallel))
    # JSON has no NaN: a loss that is not finite was written as null.
    return Comparison(*([json.loads(x)["loss"] or math.nan for x in run] for run in lines))


@torch.no_grad()
def write_text(model: nn.Module, prompt: str, *, num_tokens: int = 160) -> str:
    """Let the model go on after `prompt`, byte by byte, drawn at temperature 0.7."""
    tokenizer, generator = ByteTokenizer(), torch.Generator().manual_seed(0)
    tokens = tokenizer.encode(prompt)
    for _ in range(num_tokens):
        logits = model(torch.tensor([tokens[-example.SEQ_LEN :]]))[0, -1]
        token = int(torch.multinomial((logits / 0.7).softmax(0), 1, generator=generator))
        if token == tokenizer.end_of_document:
            break
        tokens.append(token)
    return tokenizer.decode(tokens)


def table(comparison: Comparison, every: int) -> Table:
    """Both losses side by side, for one step in `every`."""
    result = Table("step", "one process", f"{NUM_PROCESSES} processes", "relative difference")
    for column in result.columns:
        column.justify = "right"
    rows = zip(comparison.single, comparison.parallel, comparison.differences, strict=True)
    for step, (single, parallel, difference) in enumerate(rows, start=1):
        if step == 1 or step % every == 0 or step == len(comparison.single):
            result.add_row(f"{step}", f"{single:.6f}", f"{parallel:.6f}", f"{difference:.1e}")
    return result


def plot(comparison: Comparison, path: Path) -> None:
    """Draw both curves over each other, and below them how far they lie apart."""
    from matplotlib.figure import Figure

    steps = range(1, len(comparison.single) + 1)
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    losses.plot(steps, comparison.single, linewidth=4, alpha=0.35, label="one process, plain torch")
    label = f"{NUM_PROCESSES} processes, tp=2, pp=2, 1F1B"
    losses.plot(steps, comparison.parallel, linewidth=1, color="black", label=label)
    losses.set(ylabel="loss (nats per byte)", title="The same training, divided and undivided")
    losses.legend()
    differences.axhline(DIFFERENCE_GOAL, linestyle="--", color="gray", label="allowed")
    label = "of one step (not drawn where equal in every bit)"
    differences.semilogy(steps, comparison.differences, ".", color="tab:red", label=label)
    limits = (1e-8, max(1e-2, *comparison.differences))
    differences.set(xlabel="step", ylabel="relative difference", ylim=limits)
    differences.legend()
    figure.savefig(path, dpi=120)


def show_texts(console: Console, before: list[str], after: list[str]) -> None:
    """Print what the model wrote before and after training."""
    for title, texts in (("before training", before), ("after training", after)):
        # A model that knows nothing writes control characters, which a terminal would obey.
        shown = [re.sub(r"[^ -~\n]", "?", text) for text in texts]
        console.print(Panel(Text("\n\n".join(shown)), title=title, title_align="left"))


def judge(console: Console, comparison: Comparison) -> bool:
    """Print for each of the two goals whether it is met; returns whether both are."""
    first, final = comparison.parallel[0], comparison.final_loss
    worst = max(comparison.differences)
    difference = f"largest relative difference of the two curves {worst:.1e}"
    verdicts = {
        f"loss {first:.2f} -> {final:.2f} (below {LOSS_GOAL:g})": final < LOSS_GOAL,
        # Not `worst`: max() may pass over a NaN.
        f"{difference} (at most {DIFFERENCE_GOAL:.0e})": all(
            value <= DIFFERENCE_GOAL for value in comparison.differences
        ),
    }
    for text, met in verdicts.items():
        console.print(f"[green]ok[/]      {text}" if met else f"[bold red]MISSED[/]  {text}")
    return all(verdicts.values())


def run(console: Console, out: Path, num_steps: int) -> bool:
    """Train both ways, print and plot the comparison; returns whether the goals are met."""
    single, parallel = out / "single", out / "parallel"
    for folder in (single, parallel):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METRICS).unlink(missing_ok=True)
    model = example.make_model()
    before = [write_text(model, prompt) for prompt in PROMPTS]
    console.print(
        f"An InternLM2 of {sum(p.numel() for p in model.parameters()):,} parameters learns to "
        f"write, byte by byte, from the Python language reference: {num_steps} steps, first "
        f"divided over {NUM_PROCESSES} processes, then in one. Same seed, same batches: the losses "
        "must agree."
    )
    console.rule(f"1  {NUM_PROCESSES} processes: tensor parallel 2 x pipeline parallel 2, 1F1B")
    train_in_processes(parallel, num_steps)
    console.rule("2  One process: the same model in a plain torch loop")
    train_in_one_process(single, num_steps)
    console.rule("3  Side by side")
    comparison = compare(single, parallel)
    console.print(table(comparison, every=max(1, num_steps // 10)))
    model.load_state_dict(load_file(parallel / "weights.safetensors"))
    show_texts(console, before, [write_text(model, prompt) for prompt in PROMPTS])
    if importlib.util.find_spec("matplotlib"):
        plot(comparison, out / "loss.png")
        console.print(f"plot     {out / 'loss.png'}")
    else:
        console.print("plot     none, for it needs matplotlib: pip install matplotlib")
    console.print(f"metrics  {single / METRICS}\n         {parallel / METRICS}\n")
    return judge(console, comparison)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0 if the goals are met."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo")
    parser.add_argument("--steps", type=int, default=example.NUM_STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # as each of the processes
    console = Console(highlight=False)
    start = time.perf_counter()
    try:
        passed = run(console, options.out, options.steps)
    except subprocess.CalledProcessError as error:
        console.print(f"[bold red]A process failed[/] (exit code {error.returncode}); see above.")
        return 1
    console.print(f"{'done' if passed else 'not passed'} in {time.perf_counter() - start:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
