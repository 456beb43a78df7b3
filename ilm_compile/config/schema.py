"""The schema: every key of a config with its type, default, range and meaning, in one place.

A section of the file is a dataclass here, a key a field. `SECTIONS` lists them; `model` is the one
whose keys depend on its `type` (see `model_section.py`). A key that may be None is off when left
out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ilm_compile.config.options import option
from ilm_compile.kernels.attention_order import FLASH_VERSIONS
from ilm_compile.program.plan import ATTENTION_WAYS, DTYPES, KERNELS

COMPUTE_DTYPES = ("float32", *(name for name in DTYPES if name is not None))
CONTENTS = ("model", "optimizer", "trainer", "sampler", "random", "all")
CHECKPOINT = "checkpoint"
WEIGHT_FORMATS = ("ilm", "hf", "hf-llama", "hf-internlm2", "internlm")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """How long, from which seed, in which numbers."""

    total_steps: int = option(help="optimizer steps of the whole training", low=1)
    seed: int = option(1024, "of initial weights, dropout and the order of the data", low=0)
    dtype: str = option(
        "float32", "of matmuls and attention; parameters are float32", choices=COMPUTE_DTYPES
    )
    kernels: str = option("auto", "fused Triton kernels, or none; auto: on CUDA", choices=KERNELS)
    flash_attention: str | None = option(
        None,
        "that FlashAttention in the place of torch's own, on GPUs where its package is installed",
        choices=tuple(FLASH_VERSIONS),
    )
    compile: bool | str = option(
        False, "torch.compile of each block; true: by Inductor, or another backend by name"
    )
    tf32: bool = option(False, "float32 matmuls in TF32 on GPUs that have it")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: off", low=0)
    max_skips: int = option(100, "steps in a row without finite gradients that end it", low=1)
    deterministic: bool = option(False, "only deterministic kernels")
    cudnn_benchmark: bool = option(False, "let cuDNN measure its convolutions")
    timeout_s: float = option(300.0, "seconds a collective waits for a rank that hangs", above=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelOptions:
    """How the model is divided. Data-parallel ranks are what the others leave."""

    tensor: int = option(1, "ranks that share every layer", low=1)
    context: int = option(1, "ranks that share every sequence", low=1)
    expert: int = option(1, "ranks that share a micro-batch, and divide the experts", low=1)
    context_attention: str | None = option(
        None, "attention over context ranks; by cost if left out", choices=ATTENTION_WAYS[1:]
    )
    pipeline: int = option(1, "ranks that hold consecutive layers", low=1)
    num_chunks: int = option(1, "pipeline stages on each rank", low=1)
    schedule: str | None = option(
        None,
        "1f1b, gpipe, interleaved_1f1b, zb_h1, zb_h2, zb_v, dualpipe_v, v_half, v_min; by "
        "num_chunks if left out",
    )
    zero: int = option(1, "1: shard optimizer state over dp; 3: parameters too", choices=(1, 3))
    sequence_parallel: bool | None = option(None, "decided by cost if left out")
    async_tensor_parallel: bool = option(
        False, "gathers and scatters of tokens run beside the products next to them"
    )
    embed_split_hidden: bool | None = option(None, "embedding cut by hidden size; by cost")
    checkpoint: bool | float | Literal["selective", "auto"] = option(
        False,
        "fraction of blocks that recompute; 'selective': all, what is cheap; 'auto': what must be",
        low=0,
        high=1,
    )
    memory: str | None = option(None, "with checkpoint = 'auto': what a rank may fill, as '80GiB'")
    check_memory: bool = option(True, "refuse at start what the memory of a device cannot hold")
    dispatch: bool | None = option(None, "rows go to their experts, or tokens to all; by cost")
    constraints: Mapping[str, str] = option({}, "parameter name or glob to placement, 'S(0)'")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """What is trained on. A micro-batch has micro_bsz * seq_len tokens."""

    seq_len: int = option(help="tokens of a row", low=1)
    micro_bsz: int = option(1, "rows of a micro-batch", low=1)
    micro_num: int = option(1, "micro-batches of a step on each data-parallel rank", low=1)
    type: Literal["tokenized", "text", "chat", "pydoc", "random"] = option(
        "tokenized",
        "tokenized: .bin of prepare-data or InternLM; text: files of text; chat: JSON of "
        "conversations, one a row, of which the answers are learnt; pydoc: Python's own "
        "reference; random; tokenized without a folder is random too",
    )
    train_folder: str | None = option(None, "folder of training data, a sub-folder for each type")
    valid_folder: str | None = option(None, "folder of validation data, each sub-folder a set")
    valid_every: int = option(0, "steps between evaluations; 0: never", low=0)
    valid_batches: int | None = option(None, "global batches of an evaluation; all", low=1)
    tokenizer: str | None = option(
        None, "of text and chat: bytes, or a tokenizer's file; model.hf's if there is one, or bytes"
    )
    json_field: str | None = option(
        None, "of data.type='text': the field of JSON objects that holds the text or the messages"
    )
    packing: Literal["cut", "whole", "window"] = option(
        "cut", "cut: samples go on in the next row; whole: never; window: rows without boundaries"
    )
    one_row: bool = option(
        False,
        "packing='cut': the rows of a micro-batch are one row, in which a document is cut after "
        "seq_len tokens, as InternEvo does",
    )
    long_documents: Literal["refuse", "split", "truncate"] = option(
        "refuse", "what packing='whole' and chat do with a sample longer than a row"
    )
    max_documents: int | None = option(None, "in one row at most; by seq_len if left out", low=1)
    min_length: int = option(0, "leave shorter samples out", low=0)
    min_length_dict: Mapping[str, int] = option({}, "the same by type, for those named")
    zero_is_target: bool = option(True, "token 0 is learnt; InternLM never does")
    learn_ends: bool = option(
        True,
        "packing='window': what follows a document's end, and the last row of a micro-batch, is "
        "a target; InternLM never learns it",
    )
    skip_batches: str = option("", "numbers of batches that are left out, from 0: '2-5,8'")
    rampup_batch_size: str = option("", "'start increment every', in micro-batches")
    seed: int | None = option(None, "of the order of the samples; train.seed if left out", low=0)
    num_worker: int = option(0, "processes that read batches ahead; 0: none", low=0)
    fixed_random_dataset_seqlen: bool = option(False, "random data of full rows")

    @property
    def has_boundaries(self) -> bool:
        """Whether the model is told where documents begin in a row."""
        return self.packing != "window" and self.type != "chat"

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return 1 if self.one_row else self.micro_bsz

    @property
    def row_tokens(self) -> int:
        """Tokens of a row."""
        return self.seq_len * self.micro_bsz // self.rows


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerOptions:
    """AdamW."""

    lr: float = option(3e-4, "learning rate after warm-up", above=0)
    beta1: float = option(0.9, "of the gradient's average", low=0, high=0.9999999)
    beta2: float = option(0.95, "of its square's average", low=0, high=0.9999999)
    eps: float = option(1e-8, "added to the root", above=0)
    weight_decay: float = option(0.1, "of matrices", low=0)
    decay_all: bool = option(False, "of norms and biases too, as InternEvo does")


@dataclass(frozen=True, kw_only=True, slots=True)
class LrSchedulerOptions:
    """Steps at rate 0, linear warm-up, then half a cosine down to eta_min."""

    total_steps: int | None = option(None, "where the cosine ends; train.total_steps", low=1)
    init_steps: int = option(0, "steps at rate 0", low=0)
    warmup_ratio: float = option(0.01, "part of total_steps for warm-up", low=0, high=1)
    eta_min: float = option(1e-5, "the last learning rate", low=0)
    hold_peak: bool = option(
        False, "one more step at the full rate first, so that all later rates are a step later"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Beta2SchedulerOptions:
    """beta2 of step t is max(init_beta2, 1 - t^-c)."""

    init_beta2: float | None = option(None, "optimizer.beta2 if left out", low=0, high=0.9999999)
    c: float = option(0.0, "0: constant", low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GradScalerOptions:
    """The loss scale of float16 training; bfloat16 and float32 have none."""

    initial_scale: float = option(65536.0, above=0, help="of the first step")
    min_scale: float = option(1.0, above=0, help="never below")
    max_scale: float = option(2.0**24, above=0, help="never above")
    growth_interval: int = option(1000, "steps without overflow before it grows", low=1)
    growth_factor: float = option(2.0, "how much it grows", above=1)
    backoff_factor: float = option(0.5, "how much it shrinks", above=0, high=0.999)
    hysteresis: int = option(2, "overflows before it shrinks", low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """Cross entropy over the target tokens of the whole global batch."""

    label_smoothing: float = option(0.0, "part of the target spread evenly", low=0, high=0.999)


@dataclass(frozen=True, kw_only=True, slots=True)
class CkptOptions:
    """Checkpoints: a folder for each step, complete or not there."""

    enabled: bool = option(True, "save at all")
    folder: str | None = option(None, "'local:PATH', or an fsspec URL such as 's3://bucket/path'")
    every: int = option(0, "steps between saves; 0: only the last step's", low=0)
    keep_last: int = option(2, "newest ones that stay", low=1)
    keep_every: int = option(0, "those of every so many steps stay for good; 0: none", low=0)
    auto_resume: bool = option(True, "go on from the newest complete one in folder")
    asynchronous: bool = option(True, "write while training goes on")
    load_path: str | None = option(None, "start from this one where there is none to resume")
    load_content: tuple[str, ...] = option(("model",), "what of it", choices=CONTENTS)
    load_format: str = option(
        CHECKPOINT,
        "of load_path: a checkpoint, or weights alone in one of the formats of convert",
        choices=(CHECKPOINT, *WEIGHT_FORMATS),
    )
    allow_change: tuple[str, ...] = option(
        (), "keys of the model, 'model.rope_base', that may differ from those of the weights"
    )
    stop_file: str | None = option(None, "'+N' in it saves at step N and ends, '-N' goes on")


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorOptions:
    """What is watched while it runs, and who is told. Of seconds and ratios, 0 is off."""

    webhook: str | None = option(None, "URL that is told of trouble, or the variable, 'env:NAME'")
    webhook_kind: Literal["feishu", "slack", "json"] = option("json", "what it understands")
    command: tuple[str, ...] = option((), "program and arguments, the message is added")
    stuck_s: float = option(300.0, "seconds without a step that count as stuck", low=0)
    hang_s: float = option(
        120.0,
        "seconds in one action of a step that end a job of several processes; at most 0.8 of "
        "train.timeout_s",
        low=0,
    )
    loss_spike_ratio: float = option(1.5, "of the usual loss that counts as a spike", low=0)
    slow_rank_ratio: float = option(1.5, "of the other ranks' time that counts as slow", low=0)
    slow_rank_every: int = option(50, "steps between measurements of the ranks", low=1)
    min_free_gib: float = option(1.0, "GiB of free disk below which it warns", low=0)
    grace_s: float = option(30.0, "seconds after SIGTERM in which it must have saved", above=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingOptions:
    """Where and what is written of a run. Every run has a folder of its own below `folder`."""

    folder: str = option("runs", "metrics.jsonl, config.toml and TensorBoard's files go below it")
    console: bool = option(True, "one line a step on the terminal")
    tensorboard: bool = option(False, "write TensorBoard's files")
    wandb_project: str = option("", "send figures to this project of Weights & Biases")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilerOptions:
    """torch.profiler over windows of steps, as Chrome traces with stage and micro-batch names."""

    enabled: bool = option(False, "also --profiling")
    first_step: int = option(4, "of the first window", low=1)
    num_steps: int = option(2, "of a window", low=1)
    every: int = option(0, "steps from one window to the next; 0: only one window", low=0)
    with_stack: bool = option(False, "the Python stack of every op too")
    memory: bool = option(True, "memory by module as HTML, of the first step of the first window")
    timeline: bool = option(
        True, "that step's pipeline as SVG, below the schedule planned and simulated"
    )


SECTIONS: dict[str, Any] = {
    "train": TrainOptions,
    "parallel": ParallelOptions,
    "data": DataOptions,
    "optimizer": OptimizerOptions,
    "lr_scheduler": LrSchedulerOptions,
    "beta2_scheduler": Beta2SchedulerOptions,
    "grad_scaler": GradScalerOptions,
    "loss": LossOptions,
    "ckpt": CkptOptions,
    "monitor": MonitorOptions,
    "logging": LoggingOptions,
    "profiler": ProfilerOptions,
}
