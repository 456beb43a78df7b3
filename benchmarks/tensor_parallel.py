"""Our tensor parallelism beside torch's own: the same Hugging Face Llama, tp=2, real processes.

    python -m benchmarks.tensor_parallel

Three contestants train the same model on the same batch in the same two processes over gloo, taking
turns step by step (A B C A B C ...), forward and backward in fp32, gradients left as they come:

* ``ours``        `ilm_compile.parallelize(model, tp=2)`, `execute_schedule` of the whole batch;
* ``dtensor``     torch's `parallelize_module` with the plan of its own tutorial: column-wise and
                  row-wise linear layers, a row-wise embedding, a vocabulary-parallel loss;
* ``torchtitan``  the same with sequence parallelism, after what torchtitan does to Llama 3
                  (pytorch/torchtitan, torchtitan/models/llama3/infra/parallelize.py, `apply_tp`):
                  norms sharded over the sequence, gathered before attention and feed-forward.

All three must agree on the loss and on the norm of all gradients. A step's time is the longest of
the two ranks, counted from a barrier; the table has medians over the repetitions.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import ilm_compile
from benchmarks.common import launch, random_batch, save_json

RESULTS = Path(__file__).parent / "results" / "tensor_parallel.json"
VOCAB = 2048
AGREEMENT = 1e-4  # relative, of losses and gradient norms in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A Llama and its batch. repeats: measured steps of each contestant."""

    hidden: int
    layers: int
    seq: int
    rows: int = 1
    repeats: int

    def __str__(self) -> str:
        return f"hidden {self.hidden}, {self.layers} layers, {self.rows} x {self.seq} tokens"


SIZES = (
    Size(hidden=128, layers=4, seq=128, repeats=40),
    Size(hidden=256, layers=4, seq=256, repeats=30),
    Size(hidden=512, layers=4, seq=256, repeats=20),
    Size(hidden=512, layers=4, seq=512, repeats=15),
    Size(hidden=1024, layers=2, seq=512, repeats=10),
)


class Contestant:
    """A way to train: `step` runs forward and backward and returns the loss."""

    step: Callable[[], Tensor]
    zero_grad: Callable[[], None]
    named_parameters: Callable[[], Any]

    def grad_norm(self) -> float:
        """The norm of all gradients, whole ones gathered from both ranks. Collective."""
        total = 0.0
        for _, parameter in self.named_parameters():
            grad = parameter.grad
            full = grad.full_tensor() if isinstance(grad, DTensor) else grad
            total += float(full.double().square().sum())
        return total**0.5


class Ours(Contestant):
    def __init__(self, size: Size, batch: dict[str, Tensor]) -> None:
        shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
        self.parallel = ilm_compile.parallelize(llama(size), tp=2, example_inputs=shapes)
        self.batch = batch
        self.zero_grad = self.parallel.zero_grad
        self.named_parameters = self.parallel.named_parameters

    def step(self) -> Tensor:
        loss = self.parallel.execute_schedule(self.batch)
        assert isinstance(loss, Tensor)
        return loss


class Torch(Contestant):
    """torch's modules with DTensor parameters, as `plan` makes them."""

    def __init__(
        self, size: Size, batch: dict[str, Tensor], plan: Callable[[nn.Module, DeviceMesh], None]
    ) -> None:
        self.model = llama(size)
        plan(self.model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
        self.zero_grad = self.model.zero_grad
        self.named_parameters = self.model.named_parameters
        self.input_ids = batch["input_ids"]
        self.position_ids = torch.arange(size.seq).unsqueeze(0)
        # Shifted once for all, while the model that we compile shifts them in every step.
        self.targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()

    def step(self) -> Tensor:
        with loss_parallel():
            # Positions are given because the model would count the tokens of a sharded embedding.
            logits = self.model(
                self.input_ids, position_ids=self.position_ids, use_cache=False
            ).logits
            loss = F.cross_entropy(logits.flatten(0, 1), self.targets)
            loss.backward()
        return loss.detach()


def dtensor_plan(model: nn.Module, mesh: DeviceMesh) -> None:
    """Megatron's plan as torch's tutorial on tensor parallelism writes it."""
    block = {
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, _for_all_blocks(block) | ends)


def torchtitan_plan(model: nn.Module, mesh: DeviceMesh) -> None:
    """The same, activations sharded over the sequence between the products."""
    block = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        ),
    }
    parallelize_module(model, mesh, _for_all_blocks(block) | ends)


def _for_all_blocks(plan: dict[str, Any]) -> dict[str, Any]:
    return {f"model.layers.*.{name}": style for name, style in plan.items()}


CONTESTANTS: dict[str, Callable[[Size, dict[str, Tensor]], Contestant]] = {
    "ours": Ours,
    "dtensor": lambda size, batch: Torch(size, batch, dtensor_plan),
    "torchtitan": lambda size, batch: Torch(size, batch, torchtitan_plan),
}


def llama(size: Size) -> nn.Module:
    """A Llama with the same random weights on every rank."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=size.seq,
    )
    return transformers.LlamaForCausalLM(config).train()


def run_rank(sizes: list[Size], repeats_factor: float) -> list[dict[str, Any]]:
    """This rank's part: for each size the loss, gradient norm and step times of each contestant."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    results = []
    for size in sizes:
        batch = random_batch(size.rows, size.seq, VOCAB)
        contestants = {name: make(size, batch) for name, make in CONTESTANTS.items()}
        repeats = max(3, round(size.repeats * repeats_factor))
        results.append(measure(contestants, repeats))
    dist.destroy_process_group()
    return results


def measure(
    contestants: dict[str, Contestant], repeats: int, warmup: int = 2
) -> dict[str, dict[str, Any]]:
    """Run the contestants in turn; garbage is collected between the measured parts."""
    results: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "cpu_seconds": []} for name in contestants
    }
    gc.disable()
    for repetition in range(warmup + repeats):
        for name, contestant in contestants.items():
            contestant.zero_grad()
            gc.collect()
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = contestant.step()
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            if repetition == 0:
                results[name] |= {"loss": float(loss), "grad_norm": contestant.grad_norm()}
            elif repetition >= warmup:
                results[name]["seconds"].append(seconds)
                results[name]["cpu_seconds"].append(cpu)
    gc.enable()
    return results


def summarize(size: Size, ranks: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """The figures of one size. Raises `AssertionError` unless the contestants agree."""
    row: dict[str, Any] = {"size": asdict(size)}
    for name, own in ranks[0].items():
        slowest = [max(times) for times in zip(*(r[name]["seconds"] for r in ranks), strict=True)]
        row[name] = {
            "median_ms": round(median(slowest) * 1e3, 3),
            "fastest_ms": round(min(slowest) * 1e3, 3),
            "cpu_ms": round(median(own["cpu_seconds"]) * 1e3, 3),
            "loss": own["loss"],
            "grad_norm": own["grad_norm"],
        }
    for other in ("dtensor", "torchtitan"):
        for what in ("loss", "grad_norm"):
            expected, got = row["ours"][what], row[other][what]
            assert abs(got - expected) <= AGREEMENT * abs(expected), (str(size), other, what, row)
        row[f"{other}_over_ours"] = round(row[other]["median_ms"] / row["ours"]["median_ms"], 3)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as text."""
    heading = f"{'':38}{'ours':>9}{'dtensor':>16}{'torchtitan':>18}   (median ms per step)"
    lines = [heading]
    for row in rows:
        line = f"{str(Size(**row['size'])):38}{row['ours']['median_ms']:9.1f}"
        for other, width in (("dtensor", 8), ("torchtitan", 10)):
            ratio = f"({row[f'{other}_over_ours']:.2f} x)"
            line += f"{row[other]['median_ms']:{width}.1f} {ratio:>7}"
        lines.append(line)
    return "\n".join(lines)


def run(sizes: list[Size], repeats_factor: float = 1.0) -> list[dict[str, Any]]:
    """Measure all sizes in one pair of processes."""
    ranks = launch(run_rank, 2, sizes, repeats_factor)
    return [summarize(size, [rank[i] for rank in ranks]) for i, size in enumerate(sizes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=float, default=1.0, help="factor on the repetitions")
    parser.add_argument("--sizes", type=int, nargs="*", help="indices of the sizes to measure")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    chosen = range(len(SIZES)) if arguments.sizes is None else arguments.sizes
    rows = run([SIZES[i] for i in chosen], arguments.repeats)
    print(table(rows))
    save_json(arguments.output, {"transformers": transformers.__version__, "rows": rows})


if __name__ == "__main__":
    main()
