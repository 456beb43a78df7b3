"""Steps with ``compile=True`` beside eager ones: `python -m benchmarks.compiled`.

One process, one thread, no parallelism: forward and backward of a small model of each family in
four ways, in turn: plain PyTorch, torch.compile of the whole model, `parallelize`, and that with
``compile=True``. Processor time of the process, medians; ratios say what each is to another. The
losses of a model must agree, or nothing is said of its speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import ilm_compile
from benchmarks.common import RESULTS, make_console, make_model, make_parser, save_json

LAYERS, HEADS, VOCAB = 4, 8, 2048
Batch = dict[str, Tensor]


def _internlm2(hidden: int) -> nn.Module:
    sizes = {"num_layers": LAYERS, "hidden_size": hidden, "num_attention_heads": HEADS}
    fields = {**sizes, "num_kv_attention_heads": HEADS, "vocab_size": VOCAB}
    return make_model("internlm2_tiny", fields, device="cpu")


def _llama(hidden: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            vocab_size=VOCAB,
            use_cache=False,
        )
    )


def _gpt2(hidden: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=hidden, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCAB)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config.use_cache = False
    return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "InternLM2": _internlm2,
    "Llama": _llama,
    "GPT-2": _gpt2,
}


@dataclass(frozen=True)
class Row:
    """One model: milliseconds of a step in each way, and what was compiled in how many seconds."""

    model: str
    hidden: int
    plain_ms: float
    torch_compile_ms: float
    eager_ms: float
    compiled_ms: float
    compilations: list[str]

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Eager to plain PyTorch, compiled to eager, compiled to torch.compile of the model."""
        return (
            self.eager_ms / self.plain_ms,
            self.compiled_ms / self.eager_ms,
            self.compiled_ms / self.torch_compile_ms,
        )


def measure(
    name: str, *, hidden: int, rows: int, tokens: int, rounds: int, backend: str = "inductor"
) -> Row:
    """The row of one model. Raises `AssertionError` if the ways disagree in the loss."""
    torch.manual_seed(0)
    model = MODELS[name](hidden).train()
    shape = (rows, tokens)
    inputs = {key: (shape, torch.int64) for key in ("input_ids", "labels")}
    batch = {key: torch.randint(VOCAB, shape) for key in inputs}
    whole: Any = torch.compile(model, dynamic=False, backend=backend)
    eager, compiled = (
        ilm_compile.parallelize(model, example_inputs=inputs, compile=wanted)
        for wanted in (False, backend)
    )

    def plain(run: Callable[..., Any]) -> Tensor:
        model.zero_grad()
        found = run(**batch)
        loss: Tensor = found if isinstance(found, Tensor) else found.loss
        loss.backward()
        return loss.detach()

    def ours(parallel: ilm_compile.Parallel) -> Tensor:
        parallel.zero_grad()
        loss = parallel.execute_schedule(batch)
        assert isinstance(loss, Tensor)
        return loss

    ways: list[Callable[[], Tensor]] = [
        lambda: plain(model),
        lambda: plain(whole),
        lambda: ours(eager),
        lambda: ours(compiled),
    ]
    losses = [way() for way in ways for _ in range(2)]  # the first step compiles
    for loss in losses:
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-5)
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, spent in zip(ways, times, strict=True):
            start = time.process_time()
            way()
            spent.append((time.process_time() - start) * 1e3)
    said = [str(each) for each in compiled.compilations]
    return Row(name, hidden, *map(median, times), said)


def main() -> None:
    parser = make_parser("compiled", __doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("model", "hidden", "eager / PyTorch", "compiled / eager", "/ torch.compile")
    found = []
    for name in MODELS:
        for hidden in options.hidden:
            row = measure(
                name,
                hidden=hidden,
                rows=options.rows,
                tokens=options.tokens,
                rounds=options.rounds,
            )
            found.append(row)
            table.add_row(name, str(hidden), *(f"{ratio:.2f}" for ratio in row.ratios))
    make_console().print(table)
    save_json(RESULTS / "compiled.json", {"rows": found})


if __name__ == "__main__":
    main()
