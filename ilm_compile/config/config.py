"""A whole config, checked, and what can be made of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ilm_compile.config.model_section import FAMILIES, ModelOptions
from ilm_compile.config.schema import (
    Beta2SchedulerOptions,
    CkptOptions,
    DataOptions,
    GradScalerOptions,
    LoggingOptions,
    LossOptions,
    LrSchedulerOptions,
    MonitorOptions,
    OptimizerOptions,
    ParallelOptions,
    ProfilerOptions,
    TrainOptions,
)
from ilm_compile.config.toml_text import to_toml
from ilm_compile.files import write_text
from ilm_compile.models import HF
from ilm_compile.program.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that decides a training run. Made by `load_config` and `make_config`.

    notices: what the file asked for that has no effect, with file and line; not part of the config.
    """

    model: ModelOptions
    train: TrainOptions
    data: DataOptions
    job_name: str = "train"
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    lr_scheduler: LrSchedulerOptions = field(default_factory=LrSchedulerOptions)
    beta2_scheduler: Beta2SchedulerOptions = field(default_factory=Beta2SchedulerOptions)
    grad_scaler: GradScalerOptions = field(default_factory=GradScalerOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    ckpt: CkptOptions = field(default_factory=CkptOptions)
    monitor: MonitorOptions = field(default_factory=MonitorOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    profiler: ProfilerOptions = field(default_factory=ProfilerOptions)
    notices: tuple[str, ...] = field(default=(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values, as `make_config` takes them."""
        values = asdict(self)
        del values["notices"]
        model = values.pop("model")
        return {"job_name": values.pop("job_name"), "model": _flat(model), **values}

    def to_toml(self) -> str:
        """The config as a TOML file that loads to an equal one."""
        return to_toml(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write `to_toml`; the file is whole or not there."""
        write_text(Path(path), self.to_toml())

    @property
    def run_folder(self) -> Path:
        """Where everything that this run writes goes, unless a key says otherwise."""
        return Path(self.logging.folder) / self.job_name

    @property
    def lr_total_steps(self) -> int:
        """Where the learning rate reaches its end."""
        return self.lr_scheduler.total_steps or self.train.total_steps

    def plan(self) -> Plan:
        """How the model is divided. Raises `PlanError` for sizes that contradict each other."""
        parallel, train = self.parallel, self.train
        by_chunks = "interleaved_1f1b" if parallel.num_chunks > 1 else "1f1b"
        return Plan(
            tp=parallel.tensor,
            cp=parallel.context,
            ep=parallel.expert,
            pp=parallel.pipeline,
            num_chunks=parallel.num_chunks,
            num_microbatches=self.data.micro_num,
            schedule=parallel.schedule or by_chunks,
            sequence_parallel=parallel.sequence_parallel,
            async_tensor_parallel=parallel.async_tensor_parallel,
            cp_attention=parallel.context_attention,
            embed_split_hidden=parallel.embed_split_hidden,
            dispatch=parallel.dispatch,
            constraints=tuple(parallel.constraints.items()),
            checkpoint=parallel.checkpoint,
            memory=parallel.memory,
            dtype=None if train.dtype == "float32" else train.dtype,
            zero=parallel.zero,
            kernels=train.kernels,
            compile=train.compile,
            seed=train.seed,
        )

    def model_fields(self) -> dict[str, Any]:
        """The keywords of the builder that `model.type` names, seed and row length included."""
        from_elsewhere = {"seed": self.train.seed, "max_seq_len": self.data.seq_len}
        if (folder := self.hf_folder) is not None:
            return {"hf": folder}  # what its weights are is no matter of its architecture
        extra = from_elsewhere if self.model.type in FAMILIES else {}
        return {**self.model.fields, **extra}

    @property
    def hf_folder(self) -> str | None:
        """The Hugging Face folder that the model is built from, None for any other model."""
        return str(self.model.fields["hf"]) if self.model.type == HF else None

    @property
    def tokenizer(self) -> str:
        """data.tokenizer, or what it is where it is left out."""
        if self.data.tokenizer is not None:
            return self.data.tokenizer
        folder = self.hf_folder
        return "bytes" if folder is None else str(Path(folder) / "tokenizer.json")


def _flat(model: dict[str, Any]) -> dict[str, Any]:
    return {"type": model["type"], **model["fields"]}
