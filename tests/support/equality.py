"""The promise: loss and every gradient under a plan equal the single-device model's."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ilm_compile
from ilm_compile import models
from tests.support.experts import MixtureOfExperts
from tests.support.prepared import Prepared
from tests.support.promote import promoted_float32
from tests.support.traced import compile_only, compiled_before, forget_compiled, traced_once
from tests.support.world import World
from tests.support.zoo import EXPERTS_LISTED, LISTED, listed_model

SEQ, VOCAB = 16, 512
TINY = {"num_layers": 4, "max_seq_len": SEQ}
ROWS = 2  # of a micro-batch
BOUNDARIES = (ROWS, 4)  # of packed documents
EXAMPLE = {name: ((ROWS, SEQ), torch.int64) for name in ("input_ids", "labels")}


def hf_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=VOCAB,
        )
    )


def hf_gpt2(heads: int = 8, dropout: float = 0.0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=8 * heads,
        n_layer=4,
        n_head=heads,
        vocab_size=VOCAB,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    return GPT2LMHeadModel(config)


def decoder(name: str, **fields: Any) -> nn.Module:
    """A mixture of experts of InternEvo whose router decides, and drops rows where it may."""
    sizes = {"hidden_size": 32, "vocab_size": VOCAB, "num_attention_heads": 4, "multiple_of": 8}
    sizes |= {"num_kv_attention_heads": 2, "num_experts": 4, "top_k": 2, "router_init_std": 0.5}
    build = models.MODEL_INITIALIZER.get_module(name)
    return build(**{**TINY, **sizes, "num_layers": 2, "mlp_ratio": 1.5, **fields})


MODELS = {
    "INTERNLM_MoE": partial(
        decoder, "INTERNLM_MoE", num_shared_experts=1, capacity_factor=0.75, min_capacity=1
    ),
    "QWEN3MOE": partial(decoder, "QWEN3MOE", head_dim=16),
    "internlm": lambda: models.internlm_tiny(**TINY),
    "internlm2": lambda: models.internlm2_tiny(**TINY),
    "eight blocks": lambda: models.internlm2_tiny(**{**TINY, "num_layers": 8}, hidden_size=32),
    "llama": hf_llama,
    "gpt2": hf_gpt2,
    "dropout": partial(hf_gpt2, dropout=0.1),
    "experts": lambda: MixtureOfExperts(VOCAB),
    "three heads": partial(hf_gpt2, 3),
    "one key head": lambda: models.internlm2_tiny(**TINY, num_kv_attention_heads=1),
    **{name: partial(listed_model, name) for name in LISTED | EXPERTS_LISTED},
}


@dataclass(frozen=True)
class Case:
    """One model under one plan."""

    model: str
    plan: dict[str, Any] = field(default_factory=dict)
    dp: int = 1
    packed: bool = False  # rows of several documents

    def __str__(self) -> str:
        words = [self.model, *(["packed"] if self.packed else [])]
        return "-".join([*words, *(f"{k}{v}" for k, v in self.plan.items()), f"dp{self.dp}"])


@dataclass(frozen=True)
class Errors:
    """Relative errors of a case; `worst` names the parameter with the largest gradient error."""

    loss: float
    gradient: float
    worst: str


def make_model(name: str) -> nn.Module:
    """Return the model in float64, the same on every rank, no parameter left at zero or one."""
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.05)
    return model


def make_batch(rows: int, *, packed: bool = False) -> dict[str, Tensor]:
    """Return a global batch whose rows have very unequal numbers of targets."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, VOCAB, (rows, SEQ), generator=generator)
    labels = torch.randint(0, VOCAB, (rows, SEQ), generator=generator)
    for row in range(rows):
        labels[row, : (row * 5) % (SEQ - 1)] = -100
    batch = {"input_ids": input_ids, "labels": labels}
    if packed:
        starts = torch.rand(rows, SEQ - 1, generator=generator).argsort(1)[:, : BOUNDARIES[1] - 1]
        bounds = torch.nn.functional.pad(1 + starts.sort(1).values, (1, 0))
        batch["cu_seqlens"] = bounds.to(torch.int32)
    return batch


def reference(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of the untransformed model on the whole batch."""
    model.zero_grad()
    options = (
        {"use_cache": False} if hasattr(model, "config") and hasattr(model, "generate") else {}
    )
    result = model(**batch, **options)
    loss = result if isinstance(result, Tensor) else result.loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def compare(
    loss: Tensor, expected: Tensor, got: dict[str, Tensor], want: dict[str, Tensor]
) -> Errors:
    """Return relative errors; gradients are measured against at least 1e-5 of the global norm."""
    floor = 1e-5 * torch.stack([g.norm() for g in want.values()]).norm()
    errors = {
        n: float((got[n] - g).norm() / torch.maximum(g.norm(), floor)) for n, g in want.items()
    }
    worst = max(errors, key=errors.__getitem__)
    return Errors(float((loss - expected).abs() / expected.abs()), errors[worst], worst)


def parallelize(case: Case, model: nn.Module) -> ilm_compile.Parallel:
    inputs = {**EXAMPLE, **({"cu_seqlens": (BOUNDARIES, torch.int32)} if case.packed else {})}
    return ilm_compile.parallelize(model, example_inputs=inputs, **case.plan)


_made: dict[str, nn.Module] = {}  # for ranks that are forked from this process


def compile_cases(size: int, cases: list[Case]) -> None:
    """Compile what ranks forked from this process will run as `run_cases`."""
    forget_compiled()
    for case in cases:
        with promoted_float32(), traced_once((case.model, case.packed)):
            if case.model not in _made:
                _made[case.model] = make_model(case.model)
            compile_only(case.model, partial(parallelize, case, _made[case.model]))


def run_case(case: Case) -> tuple[Errors | None, float]:
    """Run one case on this rank; returns the errors on rank 0, and the loss."""
    with promoted_float32(), traced_once((case.model, case.packed)), compiled_before(case.model):
        model = _made.pop(case.model, None)
        if model is None:
            model = make_model(case.model)
        parallel = parallelize(case, model)
        batch = make_batch(ROWS * parallel.plan.num_microbatches * case.dp, packed=case.packed)
        loss = parallel.execute_schedule(batch)
        gradients = parallel.full_gradients()
        if not gradients:
            return None, float(loss)
        return compare(loss, *_swap(reference(model, batch), gradients)), float(loss)


def _swap(
    expected: tuple[Tensor, dict[str, Tensor]], got: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    return expected[0], got, expected[1]


def run_cases(rank: int, cases: list[Case]) -> list[tuple[str, Errors | None, float | str]]:
    """Run all cases in turn in one world."""
    return [(str(case), *run_case(case)) for case in cases]


def assert_equal(world: World, case: Case, bound: float) -> None:
    """Assert that the loss and every gradient of `case` are those of the single-device model."""
    _assert_equal(world.run(run_cases, [case]), bound)


def assert_prepared_equal(prepared: Prepared, size: int, case: Case, bound: float) -> None:
    """As `assert_equal` over `size` processes, which share one compilation."""
    _assert_equal(prepared.run(compile_cases, run_cases, size, [case]), bound)


def _assert_equal(answers: list[Any], bound: float) -> None:
    results = [answer[0] for answer in answers]
    _, errors, loss = results[0]
    assert errors.loss <= bound, errors
    assert errors.gradient <= bound, errors
    assert {other_loss for _, _, other_loss in results} == {loss}
