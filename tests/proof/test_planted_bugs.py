"""Bugs that real systems shipped, planted in ours: verify must say what would have helped.

Each test names where the bug was real, puts it into the compiler or the runtime, and reads the
report as the bug's author would: it must name the pass, the node or the parameter, and the reason.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ilm_compile.passes import shard
from ilm_compile.program import collectives, trace, vocab
from ilm_compile.program.program import Program
from ilm_compile.rewrite import stage_module
from tests.proof.small import verify


def failures(name: str, **plan: Any) -> str:
    report = verify(name, **plan)
    assert not report.ok
    return "\n".join(report.failures)


def test_norm_gradient_not_reduced_under_sequence_parallelism(monkeypatch):
    """InternLM#443, #534, #528, InternEvo#53, #420: the same reduction wrong five times."""
    insert = shard._insert

    def forgetful(program: Program, value: Any, *arguments: Any) -> Any:
        is_norm = value.op == "get_attr" and "norm" in value.target
        return value if is_norm else insert(program, value, *arguments)

    monkeypatch.setattr(shard, "_insert", forgetful)
    text = failures("internlm2", tp=2, sequence_parallel=True)
    assert "pass tensor-parallel" in text
    assert "aten.rms_norm of (S(1), I) does not give S(1); that needs (S(1), R)" in text
    assert "Is a collective missing?" in text
    assert "(layers.0.attention_norm, " in text


def test_norm_gradient_reduction_that_does_nothing(monkeypatch):
    """The same bug below the compiler: the types are right, the collective does not reduce."""
    monkeypatch.setattr(collectives, "_Redistribute", _patched("I", "R", lambda grad, comm: grad))
    text = failures("internlm2", tp=2, sequence_parallel=True)
    assert "layers.0 is not equal to the same region of the traced graph" in text
    assert "gradient of layers.0.attention_norm.weight by" in text


def test_all_reduce_whose_backward_is_an_all_reduce(monkeypatch):
    """torch's own differentiable all_reduce: upstream gradients of 1 and 2 give 3 on both ranks."""
    trap = _patched("P", "I", lambda grad, comm: comm.all_reduce(grad))
    monkeypatch.setattr(collectives, "_Redistribute", trap)
    text = failures("internlm2", tp=2, sequence_parallel=False)
    assert "after pass tensor-parallel, the first gradient that differs is that of" in text
    assert "(tok_embeddings, " in text  # the first region that has such a sum
    assert re.search(r"it is 2 times what it should be; next to it stands \w+ P -> I", text)


def test_loss_averaged_per_micro_batch(monkeypatch):
    """Wrong whenever micro-batches have unequal numbers of targets; Hugging Face Trainer, 2024."""
    monkeypatch.setattr(trace, "normalize_loss", lambda program: None)
    text = failures("internlm2", pp=2, num_microbatches=4)
    assert "a batch cut into 4 micro-batches" in text
    assert "trains the average of their losses; expected a loss that is the same for the" in text
    assert "averages over the targets" in text


def test_tied_embedding_trained_on_its_first_stage_only(monkeypatch):
    """Megatron-LM#7452: gradients of shared parameters lost where parallelisms meet."""
    storage = stage_module._storage
    stored: set[tuple[int, str]] = set()

    def first_only(program: Program, name: str) -> Tensor:
        tensor = storage(program, name)
        if (id(program), name) in stored and isinstance(tensor, nn.Parameter):
            return nn.Parameter(tensor.detach(), requires_grad=False)
        stored.add((id(program), name))
        return tensor

    monkeypatch.setattr(stage_module, "_storage", first_only)
    text = failures("hf-gpt2", pp=2)
    assert "transformer.wte.weight is held by 2 stages, and copy 2 gets no gradient" in text
    assert "must get the sum of all gradients" in text
    assert "right with one pipeline stage" in text
    assert "copies of a tied parameter" in text


def test_row_parallel_bias_added_on_every_rank(monkeypatch):
    """The oldest mistake of tensor parallelism: x @ w is a partial sum, x @ w + b is not."""
    everywhere = _patched("I", "P", lambda grad, comm: grad, forward=lambda x, comm: x.view_as(x))
    monkeypatch.setattr(collectives, "_Redistribute", everywhere)
    text = failures("internlm", tp=2)
    assert "after pass tensor-parallel, the first value that differs is that of node linear" in text
    assert "(blocks.0.mixer.out_proj, " in text
    assert re.search(r"next to it stands \w+ I -> P", text)


class _Alone:
    """A communicator that does not reduce."""

    def __init__(self, axis: str) -> None:
        real = collectives.communicator(axis)
        self.rank, self.size = real.rank, real.size

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        return x


def test_vocabulary_parallel_loss_not_reduced(monkeypatch):
    """torchtitan#3412 (chunked loss with tensor parallelism), InternEvo#316: a plausible loss."""
    monkeypatch.setattr(vocab, "communicator", _Alone)
    text = failures("hf-llama", tp=2)
    assert "after pass tensor-parallel, the first value that differs" in text
    assert "node cross_entropy_loss (" in text


class _FirstRank:
    """A communicator on which every rank believes to be the first."""

    rank = 0

    def __init__(self, axis: str) -> None:
        real = collectives.communicator(axis)
        self.size, self.all_reduce = real.size, real.all_reduce


def test_offsets_that_start_at_zero_on_every_rank(monkeypatch):
    """InternEvo#316: positions were counted as if every shard began at 0."""
    monkeypatch.setattr(vocab, "communicator", _FirstRank)
    text = failures("hf-gpt2", tp=2)
    assert "after pass tensor-parallel, the first value that differs is that of" in text
    assert "node embedding (transformer.w" in text


def _patched(src: str, dst: str, backward: Any, forward: Any = None) -> Any:
    """The collective op with another backward, or forward, of one transition."""
    real = collectives._Redistribute

    class Patched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, comm: Any, source: Any, target: Any) -> Tensor:
            ctx.is_patched = (source.kind, target.kind) == (src, dst)
            result: Tensor = real.forward(ctx, x, comm, source, target)
            return forward(x, comm) if ctx.is_patched and forward else result

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
            if ctx.is_patched:
                return backward(grad, ctx.move[0]), None, None, None
            result: tuple[Tensor, None, None, None] = real.backward(ctx, grad)
            return result

    return Patched


def test_nothing_is_planted_any_more():
    assert verify("hf-gpt2", tp=2, pp=2).ok
