"""Every key of InternEvo's configs, and what becomes of it here.

The keys are those of InternEvo at c628a8c (configs/*.py and args_sanity_check in
internlm/initialize/launch.py), those of InternLM before it, and the newer ones of commits 3a665e88
to 12884dac. A key of theirs that has the same name and meaning here is not listed: see `schema.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ilm_compile.config.model_section import FAMILIES
from ilm_compile.config.options import shown
from ilm_compile.config.table import Table
from ilm_compile.internevo.config.keys_ckpt import choice, endless, folder, load_folder, load_info
from ilm_compile.internevo.config.keys_experts import EXPERTS, model_type
from ilm_compile.internevo.config.translate import Fate, Ignored, Only, Refusal, Spread, To
from ilm_compile.models import DECODERS

_NAMES_OF_DTYPES = {
    "torch.bfloat16": ("bfloat16", False),
    "torch.float16": ("float16", False),
    "torch.half": ("float16", False),
    "torch.float32": ("float32", False),
    "torch.float": ("float32", False),
    "torch.tf32": ("float32", True),
}
# By their names of today and of earlier revisions.
_SEQUENCE_PARALLEL = {
    **{"mtp": False, "origin_tp": None, "none": None},  # None: as `sequence_parallel` says
    **{"msp": True, "megatron": True, "fsp": True, "flash-attn": True},
}
_BY_SEQUENCE = ("isp", "fstp", "intern")  # the ranks share sequences, and weights are gathered
_SCHEDULES = {"1f1b": None, "zbh1": "zb_h1", "zbv": "zb_v"}


def _schedule(value: Any, config: Table) -> dict[str, Any]:
    """Their names of schedules are written in either case, and ZBV sets the number of chunks."""
    instead = "write parallel.schedule, see schedules by name"
    name = choice(_SCHEDULES, instead)(value.lower() if isinstance(value, str) else value)
    found = {} if name is None else {"parallel.schedule": name}
    if name == "zb_v" and config.find("model.num_chunks") is None:
        found["parallel.num_chunks"] = 2
    return found


def _dtype(value: Any, config: Table) -> dict[str, Any]:
    dtype, tf32 = choice(_NAMES_OF_DTYPES, f"write one of {', '.join(_NAMES_OF_DTYPES)}")(value)
    return {"train.dtype": dtype, **({"train.tf32": True} if tf32 else {})}


def _of_internlm2(key: str, *harmless: Any, opposite: bool = False) -> Spread:
    """A key that others than INTERNLM2 have too, where only the harmless values mean nothing.

    opposite: their True is our False.
    """

    def spread(value: Any, config: Table) -> dict[str, Any]:
        family = FAMILIES.get(model_type(config))
        known = family is None or any(item.name == key for item in fields(family))
        if known:
            return {f"model.{key}": not value if opposite else value}
        if value not in harmless:
            raise Refusal(f"{shown(value)} is for model_type = 'INTERNLM2'; leave it out")
        return {}

    told = f"not `model.{key}`" if opposite else f"`model.{key}`"
    return Spread(spread, f"{told} of INTERNLM2", (f"model.{key}",))


def _no_bias(value: Any, config: Table) -> dict[str, Any]:
    if model_type(config) in DECODERS:
        return {"model.qkv_bias": not value}
    return dict(_of_internlm2("no_bias", False).function(value, config))


def _packing(value: Any, config: Table) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise Refusal(f"expected True or False, got {shown(value)}; or write data.packing")
    return {"data.packing": "window" if value else "cut"}


def _data_type(value: Any) -> Any:
    if value in ("streaming", "hf", "megatron"):
        raise Refusal(f"{shown(value)}: tokenize first with ilm-compile prepare-data; 'tokenized'")
    return value


def _zero1_fsdp(value: Any, config: Table) -> dict[str, Any]:
    return {"parallel.zero": 3} if value else {}


def _is_by_sequence(config: Table) -> bool:
    found = config.find("parallel.tensor.mode") or config.find("parallel.tensor.sp")
    return found is not None and found[0] in _BY_SEQUENCE


def _tensor_size(value: Any, config: Table) -> dict[str, Any]:
    return {"parallel.context" if _is_by_sequence(config) else "parallel.tensor": value}


def _tensor_mode(value: Any, config: Table) -> dict[str, Any]:
    if value in _BY_SEQUENCE:
        return {}
    known = choice(_SEQUENCE_PARALLEL, "write mtp, msp, fsp or isp")
    found = known(value)
    return {} if found is None else {"parallel.sequence_parallel": found}


def _weight(value: Any, config: Table) -> dict[str, Any]:
    if not isinstance(value, int) or value < 1:
        raise Refusal(f"{shown(value)}: expected a number of ranks; or write parallel.zero = 3")
    return {"parallel.zero": 3} if value > 1 else {}


def _alert_address(value: Any, config: Table) -> dict[str, Any]:
    """The address counts only if alerts are switched on beside it."""
    switch = config.find("monitor.alert.enable_feishu_alert")
    return _feishu(value, config) if switch is not None and switch[0] else {}


def _feishu(value: Any, config: Table) -> dict[str, Any]:
    return {"monitor.webhook": value, "monitor.webhook_kind": "feishu"}


_WEBHOOK = ("monitor.webhook", "monitor.webhook_kind")
_START = ("ckpt.load_path", "ckpt.load_format")

_TOP: dict[str, Fate] = {
    "JOB_NAME": To("job_name"),
    "DO_ALERT": Ignored("monitor.webhook switches alerts on", (True, False)),
    "model_type": To("model.type"),
    "cudnn_benchmark": To("train.cudnn_benchmark"),
    "cudnn_deterministic": To("train.deterministic"),
    "use_fp32_norm": Ignored("norms have float32 weights and are computed in float32", (True,)),
    "output_tf32": Only((False,), "train.tf32 = true is for all products"),
    "metric_dtype": Only(("fp32",), "metrics are float32; leave it out"),
    "enable_tb": To("logging.tensorboard"),
    "tensorboard_folder": Ignored("they go to the run's folder, see logging.folder"),
    "resume_tb_folder": Ignored("a resumed run goes on in its own folder"),
    "use_apex_adam": Ignored("torch's fused AdamW is used", (False,)),
    "generation": Ignored("nothing is generated while training"),
    "tensorboard.queue_max_length": Ignored("files are written after every step"),
    "batch_count": Only((0,), "a checkpoint knows its step: write ckpt.load_path"),
    "alert_address": Spread(_feishu, "`monitor.webhook` of kind feishu", _WEBHOOK),
    "fp8": Only((False,), "train.dtype is float32 or a 16-bit type"),
    "int8_training": Only((False,), "train.dtype is float32 or a 16-bit type"),
    "int8_mode": Ignored("see int8_training"),
    "selective_checkpoint": Ignored("to save memory write parallel.checkpoint", (False,)),
    "selective_checkpoint_offload": Ignored("to save memory write parallel.checkpoint", (False,)),
    "cpu_offloading": Ignored("to save memory write parallel.checkpoint", (False,)),
    "hf": Only((), "call ilm_compile.parallelize on the Hugging Face model, see the README"),
    "fsdp_wrap_cls": Ignored("blocks are found in the graph"),
}

_MODEL: dict[str, Fate] = {
    "num_chunks": To("parallel.num_chunks"),
    "checkpoint": To("parallel.checkpoint"),
    "dtype": Spread(
        _dtype, "`train.dtype`; torch.tf32 sets `train.tf32`", ("train.dtype", "train.tf32")
    ),
    "embed_split_hidden": To("parallel.embed_split_hidden"),
    "parallel_output": Ignored("logits stay sharded where that is cheaper", (True,)),
    "residual_in_fp32": Only((False,), "it could not be used in InternEvo either; leave it out"),
    "deepnorm": Only((False,), "leave it out"),
    "drop_rate": Only((0,), "these models have no dropout; register a model of your own"),
    "attn_drop_rate": Only((0,), "these models have no dropout; register a model of your own"),
    "dropout_selective_checkpoint": Ignored("these models have no dropout"),
    "use_swiglu": Only((True,), "for another MLP register a model of your own"),
    "use_flash_attn": Ignored("the attention kernel is chosen by the device", (True,)),
    "use_scaled_init": Only((True,), "write smaller *_init_std, which are scaled by depth"),
    "max_position_embeddings": Ignored("rotary positions have no table, any length is fine"),
    "use_dynamic_ntk_rope": Only((False,), "write a larger model.rope_base"),
    "is_reward": Only((False,), "for a reward head register a model of your own"),
    "use_sliding_window": Only((False,), "register a model of your own, or write model.hf"),
    "sliding_window": Ignored("use_sliding_window is False"),
    "max_window_layers": Ignored("use_sliding_window is False"),
    "qk_interleaved": _of_internlm2("adapt_hf", True, False, opposite=True),
    "sequence_parallel": To("parallel.sequence_parallel"),
    "use_amp": Ignored("the dtype says what is computed in", (True,)),
    "mlp_layer_fusion": Ignored("it changes no number", (True, False)),
    "enable_qkv_fusion": Ignored("files with either are read and give the same", (True, False)),
    "apply_post_layer_norm": _of_internlm2("apply_post_layer_norm", False),
    "no_bias": Spread(
        _no_bias,
        "`model.no_bias` of INTERNLM2; of BAICHUAN2 not `model.qkv_bias`",
        ("model.no_bias", "model.qkv_bias"),
    ),
    "norm_head": _of_internlm2("norm_head", False),
    "adapt_hf": _of_internlm2("adapt_hf", True, False),
}

_GATHERED: dict[str, tuple[bool, ...]] = {
    **dict.fromkeys(("overlap", "memory_pool"), (False, True)),
    **dict.fromkeys(("launch_allgather_before", "forward_overlap_per"), ()),
}

_PARALLEL: dict[str, Fate] = {
    "zero1": Ignored("optimizer state is sharded over all data-parallel ranks", (-1, 0)),
    "zero1.size": Ignored("optimizer state is sharded over all data-parallel ranks", (-1, 0)),
    "zero1.fsdp": Spread(_zero1_fsdp, "True sets `parallel.zero` = 3", ("parallel.zero",)),
    "fsdp.enable": Spread(_zero1_fsdp, "True sets `parallel.zero` = 3", ("parallel.zero",)),
    "fsdp.mode": Ignored("FSDP2 is used", ("v2",)),
    "fsdp.init_method": Ignored("parameters are made where they stay"),
    "tensor.size": Spread(
        _tensor_size,
        'sets `parallel.tensor`, with `mode="isp"` `parallel.context`',
        ("parallel.tensor", "parallel.context"),
    ),
    **dict.fromkeys(
        ("tensor.mode", "tensor.sp"),
        Spread(
            _tensor_mode,
            "msp and fsp set `parallel.sequence_parallel`; isp makes `size` that of "
            "`parallel.context`",
            ("parallel.sequence_parallel", "parallel.context"),
        ),
    ),
    **dict.fromkeys(
        ("tensor.overlap", "tensor.intern_overlap", "tensor.memory_pool"),
        Ignored("weights are not gathered by hand", (False, True)),
    ),
    "tensor.reduce_scatter_overlap": Ignored("weights are not gathered by hand", (False, True)),
    "block_0_full_weight": Ignored("weights are not gathered by hand", (False, True)),
    "pipeline.size": To("parallel.pipeline"),
    "pipeline.interleaved_overlap": Ignored("sends always overlap with computing", (True,)),
    "pipeline.mode": Spread(
        _schedule, "`parallel.schedule`", ("parallel.schedule", "parallel.num_chunks")
    ),
    "pipeline.zero_bubble": Only((False,), "write parallel.schedule", ("parallel.schedule",)),
    **dict.fromkeys(
        ("weight", "weight.size", "expert_weight", "expert_weight.size"),
        Spread(_weight, "more than 1 sets `parallel.zero` = 3", ("parallel.zero",)),
    ),
    **{
        f"{name}.{key}": Ignored("weights are not gathered by hand", fulfilled)
        for name in ("weight", "expert_weight")
        for key, fulfilled in _GATHERED.items()
    },
    "expert": To("parallel.expert", lambda value: None if value == -1 else value),
    "expert.size": Ignored(
        "it changes no number; to divide experts write parallel.expert, and a data.micro_bsz that "
        "many times as large, or parallel.zero = 3, by which each rank stores a part of them",
        (1,),
    ),
    "expert_zero1": Ignored("optimizer state is sharded over all data-parallel ranks", (-1, 0)),
    "expert_zero1.size": Ignored(
        "optimizer state is sharded over all data-parallel ranks", (-1, 0)
    ),
    "expert.no_tp": Ignored("how experts are cut for tp is decided by cost", (False,)),
    "sequence_2D.enable": Only((False,), "write parallel.sequence_parallel"),
    "sequence_2D.head_size": Ignored("sequences are cut along one dim", (1,)),
    "sequence_2D.context_size": Ignored("sequences are cut along one dim", (1,)),
    "sequence_2D.window_size": Ignored("sequences are cut along one dim", (1,)),
    "sequence_2D.device_placement_strategy": Ignored("sequences are cut along one dim"),
    "data_parallel_size": Ignored("it is what tensor and pipeline leave of the world"),
}

_DATA: dict[str, Fate] = {
    "type": To("data.type", _data_type),
    "total_steps": To("train.total_steps"),
    "gradient_accumulation": To("data.micro_num"),
    "use_packed_dataset": Only((True,), "rows are always packed; leave it out"),
    "packed_length": Ignored("it is seq_len * micro_bsz"),
    "max_length_per_sample": Only((), "a sample is cut at data.seq_len; leave it out"),
    "pack_sample_into_one": Spread(
        _packing, "`data.packing`: True is window, False is cut", ("data.packing",)
    ),
    "valid_micro_num": Ignored("an evaluation takes batches of the shape that is trained on"),
    "empty_cache_and_diag_interval": To("monitor.slow_rank_every"),
    "diag_outlier_ratio": To("monitor.slow_rank_ratio"),
    "bench_net": Ignored("monitor.slow_rank_ratio looks at the ranks' own times"),
    "tokenizer_path": Only((), "tokenize first: ilm-compile prepare-data"),
    "text_field": Only((), "tokenize first: ilm-compile prepare-data"),
    "use_shm": Ignored("files are memory-mapped, which shares them between processes"),
    "shm_path": Ignored("files are memory-mapped, which shares them between processes"),
    "is_multimodal": Only((False,), "register a model of your own and call the Python functions"),
}

_OPTIMIZER: dict[str, Fate] = {
    "adam.lr": To("optimizer.lr"),
    "adam.adam_beta1": To("optimizer.beta1"),
    "adam.adam_beta2": To("optimizer.beta2"),
    "adam.adam_beta2_c": To("beta2_scheduler.c"),
    "adam.adam_eps": To("optimizer.eps"),
    "adam.weight_decay": To("optimizer.weight_decay"),
    "adam.use_apex_adam": Ignored("torch's fused AdamW is used", (False,)),
    "lr_scheduler.last_epoch": Only((-1,), "a checkpoint knows its step: write ckpt.load_path"),
    "beta2_scheduler.cur_iter": Only((-1,), "a checkpoint knows its step: write ckpt.load_path"),
    "grad_scaler.fp16.initial_scale": To("grad_scaler.initial_scale"),
    "grad_scaler.fp16.min_scale": To("grad_scaler.min_scale"),
    "grad_scaler.fp16.growth_interval": To("grad_scaler.growth_interval"),
    "loss.op_type": Ignored("the cross entropy is sharded by the plan"),
    "hybrid_zero_optimizer.clip_grad_norm": To("train.max_grad_norm"),
    "hybrid_zero_optimizer.overlap_sync_grad": Ignored("gradients always overlap", (True,)),
    "hybrid_zero_optimizer.overlap_sync_param": Ignored("FSDP2 overlaps parameters", (True,)),
    "hybrid_zero_optimizer.zero_overlap_communication": Ignored("they always overlap", (True,)),
    "hybrid_zero_optimizer.reduce_bucket_size": Ignored("gradients are reduced by block"),
    "hybrid_zero_optimizer.reduce_comm_dtype": Ignored("gradients are reduced in float32"),
    "hybrid_zero_optimizer.use_split_tensor_optim": Ignored("every tensor is split", (True,)),
    "hybrid_zero_optimizer.all_gather_size": Ignored("parameters are gathered by block"),
}

_TOLD_START = "`ckpt.load_path` and `ckpt.load_format`, if auto_resume is False"

_CKPT: dict[str, Fate] = {
    "enable_save_ckpt": To("ckpt.enabled"),
    "save_ckpt_folder": To("ckpt.folder", folder),
    "checkpoint_every": To("ckpt.every", endless),
    "load_ckpt_info": Spread(load_info, _TOLD_START, _START),
    "load_ckpt_folder": Spread(load_folder, _TOLD_START, _START),
    "load_model_only_folder": To("ckpt.load_path", folder),
    "load_optimizer": Only((True, False), "write ckpt.load_content"),
    "async_upload": To("ckpt.asynchronous"),
    "async_upload_tmp_folder": Ignored("a save is written beside its final name, then renamed"),
    "oss_snapshot_freq": Ignored("write ckpt.every and ckpt.keep_last"),
    "snapshot_ckpt_folder": Ignored("write ckpt.every and ckpt.keep_last"),
    "stop_file_path": To("ckpt.stop_file"),
    "generate_meta_data": Ignored("every checkpoint can be resumed under any plan"),
    "universal_ckpt": Ignored("every checkpoint can be resumed under any plan"),
    "enable_internevo2hf_ckpt": Ignored("convert one: ilm-compile convert", (False,)),
}

_MONITOR: dict[str, Fate] = {
    "alert.enable_feishu_alert": Ignored("see feishu_alert_address", (True, False)),
    "alert.feishu_alert_address": Spread(
        _alert_address, "`monitor.webhook`, if enable_feishu_alert is True", _WEBHOOK
    ),
    "alert.alert_file_path": Ignored("the run's folder keeps ranks from telling the same twice"),
    "alert.light_monitor_address": Ignored("it is a service that is not public"),
    "tensorboard.queue_max_length": Ignored("files are written after every step"),
}


def _below(section: str, table: Mapping[str, Fate]) -> dict[str, Fate]:
    return {f"{section}.{name}": fate for name, fate in table.items()}


KEYS: dict[str, Fate] = {
    **_TOP,
    **_below("model", _MODEL),
    **_below("parallel", _PARALLEL),
    **_below("data", _DATA),
    **_OPTIMIZER,
    **EXPERTS,
    **_below("ckpt", _CKPT),
    **_below("monitor", _MONITOR),
}
