"""What fused ops replace, and what that does to the numbers: `python -m benchmarks.fuse_kernels`.

Per model: the fused ops of one block, the calls of a whole program before and after, and what was
left alone and why; how far loss, logits and gradients of the fused program are from those of the
plain one, both run by their torch references on a small real model, in four precisions:

float64    the largest of these must be rounding
float32    the same
bfloat16   a float32 model with the casts of dtype=torch.bfloat16
bf16 model weights and everything else in bfloat16, as Hugging Face loads a model

A difference in bfloat16 says nothing of which is nearer to the truth, so the last columns hold both
against the float32 program. Then `ilm_compile.verify` proves kernels="triton" on the model of full
width, for tp=2 and for tp=2, pp=2.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import ilm_compile
from benchmarks.common import RESULTS, make_model, make_parser, random_batch, save_json, show_table
from ilm_compile.program.dump import target_name
from ilm_compile.program.program import Program
from ilm_compile.proof.promote import promoted_float32
from tests.support.zoo import full_model, listed_model

LAYERS, ROWS, TOKENS, VOCAB = 4, 2, 16, 512
FULL_TOKENS = 512
PLANS: tuple[dict[str, Any], ...] = ({"tp": 2}, {"tp": 2, "pp": 2})
SMALL = {"num_layers": LAYERS, "max_seq_len": TOKENS}
FULL = {"num_layers": LAYERS}
Make = Callable[[], nn.Module]
Line = tuple[str, ...]


def _ours(preset: str, full: str, **fields: Any) -> tuple[Make, Make]:
    return (
        partial(make_model, preset, {**SMALL, **fields}, device="cpu"),
        partial(make_model, full, {**FULL, **fields}),
    )


# A small real model, and one of full width on the meta device.
MODELS: dict[str, tuple[Make, Make]] = {
    "InternLM": _ours("internlm_tiny", "internlm_7b"),
    "InternLM2": _ours("internlm2_tiny", "internlm2_7b", adapt_hf=True),
    "InternLM2, sorted": _ours("internlm2_tiny", "internlm2_7b", adapt_hf=False),
    **{
        name: (partial(listed_model, name, layers=LAYERS), partial(full_model, name, layers=LAYERS))
        for name in ("InternLM3", "Llama", "Qwen3", "Gemma", "Phi-3", "GPT-NeoX")
    },
}
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.float32, torch.bfloat16),
    "bf16 model": (torch.bfloat16, None),
}


def compile_model(model: nn.Module, kernels: str, dtype: torch.dtype | None) -> Program:
    inputs = {name: ((ROWS, TOKENS), torch.int64) for name in ("input_ids", "labels")}
    with promoted_float32():
        return ilm_compile.partition(model, example_inputs=inputs, kernels=kernels, dtype=dtype)


def run(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """Return the loss, the logits and every gradient of one micro-batch, in float64."""
    batch = {**random_batch(ROWS, TOKENS, VOCAB)}
    for name, count in program.target_counts.items():
        node = next(n for n in program.graph.nodes if n.target == name)
        value = count.graph(*(batch[key] for key in count.inputs))
        batch[name] = value.to(node.meta["val"].dtype)
    module = program.graph_module
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    arguments = [batch[str(n.target)] for n in program.graph.find_nodes(op="placeholder")]
    outputs = functional_call(module, {name: held[name] for name in meta}, tuple(arguments))
    loss, *others = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    model.zero_grad()
    loss.backward()
    found = {"loss": loss.detach(), "logits": (others or [loss])[0].detach()}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.double().clone() for name, value in found.items()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative differences in norm: of the loss, the logits and the worst of all gradients."""
    errors = {
        name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()
    }
    ends = {name: errors.pop(name) for name in ("loss", "logits")}
    return {**ends, "gradient": max(errors.values())}


def compare(make: Make, precision: str, exact: dict[str, Tensor]) -> dict[str, Any]:
    """How far fused is from plain in one precision, and each from the float32 program."""
    weights, compute = PRECISIONS[precision]
    model = make().to(weights)
    plain, fused = (
        run(compile_model(model, kernels, compute), model) for kernels in ("torch", "triton")
    )
    return {
        "precision": precision,
        "fused_to_plain": difference(fused, plain),
        "plain_to_float32": difference(plain, exact),
        "fused_to_float32": difference(fused, exact),
    }


def prove(make: Make, plan: dict[str, Any]) -> dict[str, Any]:
    """What `ilm_compile.verify` finds of one plan of the full-width model."""
    inputs = {name: ((1, FULL_TOKENS), torch.int64) for name in ("input_ids", "labels")}
    start = time.perf_counter()
    report = ilm_compile.verify(make(), example_inputs=inputs, kernels="triton", **plan)
    return {
        "plan": ", ".join(f"{key}={value}" for key, value in plan.items()),
        "ok": report.ok,
        **{"loss_error": report.max_loss_error, "gradient_error": report.max_grad_error},
        "seconds": time.perf_counter() - start,
        "failure": "" if report.ok else report.failures[0],
    }


def measure(name: str) -> dict[str, Any]:
    """What is fused of one model, what that does to its numbers, and whether it is proved."""
    small, full = MODELS[name]
    model = small().double()
    plain, fused = (compile_model(model, kernels, None) for kernels in ("torch", "triton"))
    block = [index for index, region in enumerate(fused.regions) if region.is_block][1]
    ops = (target_name(n) for n in fused.calls() if n.meta["region"] == block)
    per_block = Counter(op for op in ops if op.startswith("ilm.") and op != "ilm.attention")
    float32 = small().float()
    exact = run(compile_model(float32, "torch", None), float32)
    return {
        **{"model": name, "per_block": dict(per_block)},
        "calls_before": len(list(plain.calls())),
        "calls_after": len(list(fused.calls())),
        "left": [_without_path(d) for d in fused.decisions if "left alone" in d],
        "numbers": [compare(small, precision, exact) for precision in PRECISIONS],
        "proofs": [prove(full, plan) for plan in PLANS],
    }


def _without_path(decision: str) -> str:
    """A reason without the file of this machine."""
    start, _, reason = decision.rpartition("): ")
    return f"{start.split(', first ')[0]}: {reason}" if reason else decision


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print what matched, how far the numbers are, and what was proved."""
    matches, errors, proofs = list[Line](), list[Line](), list[Line]()
    for row in rows:
        name = row["model"]
        ops = ", ".join(f"{n} {op}" for op, n in sorted(row["per_block"].items()))
        calls = f"{row['calls_before']} -> {row['calls_after']}"
        matches.append((name, ops, calls, "; ".join(row["left"]) or "-"))
        for n in row["numbers"]:
            cells = [*n["fused_to_plain"].values()]
            cells += [n[f"{kind}_to_float32"]["gradient"] for kind in ("plain", "fused")]
            errors.append((name, n["precision"], *(f"{cell:.1e}" for cell in cells)))
        for p in row["proofs"]:
            found = (f"{p['loss_error']:.0e}", f"{p['gradient_error']:.0e}")
            shown = found if p["ok"] else (p["failure"], "")
            proofs.append((name, p["plan"], *shown, f"{p['seconds']:.1f}"))
    headings = ("model", "fused ops of a block", f"calls of {LAYERS} blocks", "left alone")
    show_table("matches", headings, matches)
    headings = ("gradient", "gradient: plain to float32", "fused to float32")
    show_table("fused against plain", ("model", "precision", "loss", "logits", *headings), errors)
    headings = ("model", "plan", "loss", "gradient", "seconds")
    show_table('verify, kernels="triton"', headings, proofs)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("fuse_kernels", __doc__)
    parser.add_argument("--only", action="append", help="name of a model; may be repeated")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [measure(name) for name in options.only or MODELS]
    show(rows)
    save_json(RESULTS / "fuse_kernels.json", {"models": rows})


if __name__ == "__main__":
    main()
