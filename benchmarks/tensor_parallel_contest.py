"""Three ways to train one Hugging Face Llama on two ranks: ours and torch's two.

The plans of torch's are written by hand, module by module, as their users write them. Ours follows
from the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
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

VOCAB = 2048


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


class Contestant:
    """A way to train: `step` runs forward and backward and returns the loss."""

    step: Callable[[], Tensor]
    zero_grad: Callable[[], None]
    named_parameters: Callable[[], Any]

    def result(self) -> tuple[float, float]:
        """The loss of a step, and the norm of all gradients, gathered from both ranks."""
        self.zero_grad()
        loss, total = float(self.step()), 0.0
        for _, parameter in self.named_parameters():
            grad = parameter.grad
            full = grad.full_tensor() if isinstance(grad, DTensor) else grad
            total += float(full.double().square().sum())
        return loss, total**0.5


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


class All:
    """All contestants, a step of each under its name, as `benchmarks.contest.measure` asks."""

    def __init__(self, size: Size, batch: dict[str, Tensor]) -> None:
        self.contestants = {name: make(size, batch) for name, make in CONTESTANTS.items()}
        for name, contestant in self.contestants.items():
            setattr(self, name, contestant.step)

    def zero_grad(self) -> None:
        """Forget the gradients of all."""
        for contestant in self.contestants.values():
            contestant.zero_grad()


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
