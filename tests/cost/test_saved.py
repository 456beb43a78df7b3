"""What autograd saves is predicted from the graph, byte for byte."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

import ilm_compile
from ilm_compile.cost.saved import SavedMemory
from ilm_compile.models import internlm2_tiny
from ilm_compile.program.communicator import shape_communicators
from ilm_compile.program.program import Program
from tests.support.zoo import LISTED, SEQ, listed_model

INPUTS = {name: ((2, SEQ), torch.int64) for name in ("input_ids", "labels")}
PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": {"kernels": "triton"},
    "bf16": {"dtype": torch.bfloat16},
    "fused bf16": {"kernels": "triton", "dtype": torch.bfloat16},
    "tp": {"tp": 2, "sequence_parallel": False},
    "sequence parallel": {"tp": 2, "sequence_parallel": True},
    "cp": {"cp": 2},
}


class Rank(fx.Interpreter):
    """One rank's graph on its own weights, zeros; `alive` is what it is given."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.alive: list[Tensor] = []
        self._trained = program.parameters()

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("placeholder", "get_attr"):
            return super().run_node(n)
        value = torch.zeros_like(n.meta["val"], device="cpu")
        variable = self._trained.get(str(n.target))
        self.alive.append(value)
        return value.requires_grad_(variable is not None and variable.requires_grad)


def measured(program: Program) -> int:
    """Run the graph and add up the storages that autograd packs, but those alive anyway."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    rank = Rank(program)
    inputs = program.graph.find_nodes(op="placeholder")
    with shape_communicators(program.plan.axes), saved_tensors_hooks(pack, lambda t: t):
        rank.run(*[None] * len(inputs))
    sizes = {_memory(tensor): tensor.untyped_storage().nbytes() for tensor in kept}
    alive = {_memory(tensor) for tensor in rank.alive}
    return sum(size for memory, size in sizes.items() if memory not in alive)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def predicted(program: Program) -> int:
    return sum(storage.num_bytes for storage in SavedMemory(program).of(program.calls()))


@pytest.mark.parametrize("plan", PLANS)
def test_internlm2_saves_what_is_predicted(plan: str) -> None:
    program = ilm_compile.partition(internlm2_tiny(num_layers=2, max_seq_len=16), **PLANS[plan])
    assert predicted(program) == measured(program) > 0


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("architecture", [*LISTED][:8])
def test_hugging_face_models_save_what_is_predicted(architecture: str, kernels: str) -> None:
    program = ilm_compile.partition(
        listed_model(architecture), example_inputs=INPUTS, kernels=kernels
    )
    assert predicted(program) == measured(program) > 0


class Shared(nn.Module):
    """One value that two products and a view of it save, and a frozen product that saves none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.first, self.second = (nn.Linear(4, 4, bias=False) for _ in range(2))
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.frozen(self.table(ids))
        y = self.first(x) + self.second(x.reshape(-1, 4)).reshape(x.shape)
        return ((y.sum(-1) - labels) ** 2).mean()


def test_what_two_save_counts_once() -> None:
    example = {"ids": ((3, 5), torch.int64), "labels": ((3, 5), torch.int64)}
    program = ilm_compile.partition(Shared(), example_inputs=example)
    x, difference = 3 * 5 * 4 * 4, 3 * 5 * 4
    assert predicted(program) == measured(program) == x + difference
