"""The keys of InternEvo's configs: mapped, noticed, or refused with what to write instead."""

from pathlib import Path
from typing import Any

import pytest

from ilm_compile.config import ConfigError, make_config
from ilm_compile.config.schema import SECTIONS
from tests.config.made import SIZES, SMALL, config, fault

SAMPLES = Path(__file__).parent / "samples"


THEIRS: dict[str, Any] = {
    "JOB_NAME": "a",
    "DO_ALERT": True,
    "model_type": "INTERNLM2",
    "cudnn_benchmark": True,
    "cudnn_deterministic": True,
    "use_fp32_norm": True,
    "output_tf32": False,
    "metric_dtype": "fp32",
    "enable_tb": True,
    "tensorboard_folder": "tb",
    "resume_tb_folder": "tb",
    "tensorboard": {"queue_max_length": 1},
    "batch_count": 0,
    "alert_address": "https://x",
    "moe": {"top_k": 2},
    "model": {
        "num_chunks": 1, "checkpoint": 0.2, "dtype": "torch.tf32", "embed_split_hidden": True,
        "num_kv_attention_heads": 2, "mlp_ratio": 2, "multiple_of": 256, "embed_grad_scale": 0.1,
        "parallel_output": True, "residual_in_fp32": False, "norm_type": "rmsnorm",
        "layer_norm_epsilon": 1e-6, "adapt_hf": True, "no_bias": True,
        "apply_post_layer_norm": True, "drop_rate": 0, "attn_drop_rate": 0.0,
        "dropout_selective_checkpoint": True, "use_swiglu": True, "use_flash_attn": True,
        "use_scaled_init": True, "embedding_init_std": 0.1, "attn_wqkv_init_std": 0.1,
        "attn_other_init_std": 0.1, "ffn_uplayer_init_std": 0.1, "ffn_other_init_std": 0.1,
        "out_head_init_std": 0.1, "init_type": "uniform", "rope_base": 10000, "norm_head": True,
        "max_position_embeddings": 2048, "use_dynamic_ntk_rope": False, "is_reward": False,
        "deepnorm": False, "num_experts": 1, "moe_use_residual": False, "moe_type": "GShard",
    },
    "parallel": {
        "zero1": {"size": 8, "fsdp": False}, "tensor": {"size": 2, "mode": "fsp"},
        "pipeline": {"size": 1, "interleaved_overlap": True, "mode": "1F1B"},
        "weight": {"size": 1, "overlap": True, "memory_pool": True}, "sequence_parallel": True,
    },
    "data": {
        "micro_bsz": 1, "micro_num": 4, "gradient_accumulation": 4, "valid_micro_num": 2,
        "valid_every": 5, "pack_sample_into_one": False, "use_packed_dataset": True,
        "total_steps": 100, "skip_batches": "2-5", "rampup_batch_size": "", "min_length": 1,
        "min_length_dict": {"en": 3}, "empty_cache_and_diag_interval": 9,
        "diag_outlier_ratio": 1.2, "num_worker": 2, "seed": 3, "packed_length": 32,
        "fixed_random_dataset_seqlen": True,
    },
    "ckpt": {
        "enable_save_ckpt": True, "save_ckpt_folder": "local:x", "checkpoint_every": 5,
        "load_ckpt_info": {"path": "y", "content": "model", "ckpt_type": "internevo"},
        "auto_resume": True, "async_upload": True, "async_upload_tmp_folder": "z",
        "oss_snapshot_freq": float("inf"), "snapshot_ckpt_folder": "s", "stop_file_path": "f",
    },
    "monitor": {
        "alert": {
            "enable_feishu_alert": True, "feishu_alert_address": "https://x",
            "light_monitor_address": "l", "alert_file_path": "a.log",
        },
        "tensorboard": {"queue_max_length": 10},
    },
    "hybrid_zero_optimizer": {
        "overlap_sync_grad": True, "overlap_sync_param": False, "reduce_bucket_size": 512,
        "clip_grad_norm": 2.0, "zero_overlap_communication": True,
    },
    "grad_scaler": {
        "fp16": {"initial_scale": 2**14, "min_scale": 2, "growth_interval": 10},
        "growth_factor": 3, "backoff_factor": 0.25, "max_scale": 2**20, "hysteresis": 3,
    },
    "adam": {
        "lr": 1e-3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_beta2_c": 0.5, "adam_eps": 1e-6,
        "weight_decay": 0.2,
    },
    "lr_scheduler": {
        "total_steps": 90, "init_steps": 1, "warmup_ratio": 0.1, "eta_min": 1e-6, "last_epoch": -1,
    },
    "beta2_scheduler": {"init_beta2": 0.9, "c": 0.5, "cur_iter": -1},
    "loss": {"label_smoothing": 0.1, "moe_loss_coeff": 1.0},
}  # fmt: skip


NOTICED = [
    *["moe", "tensorboard.queue_max_length", "tensorboard_folder", "resume_tb_folder"],
    *["model.dropout_selective_checkpoint", "model.max_position_embeddings", "model.moe_type"],
    *["parallel.zero1.size", "data.packed_length", "data.valid_micro_num"],
    *["ckpt.async_upload_tmp_folder", "ckpt.oss_snapshot_freq", "ckpt.snapshot_ckpt_folder"],
    *["monitor.alert.light_monitor_address", "monitor.alert.alert_file_path"],
    *["monitor.tensorboard.queue_max_length", "loss.moe_loss_coeff"],
    "hybrid_zero_optimizer.overlap_sync_param",
    "hybrid_zero_optimizer.reduce_bucket_size",
]


def test_every_key_of_internevo_is_mapped_or_noticed() -> None:
    values = {**THEIRS, "model": {**SIZES, **THEIRS["model"]}}
    values["data"] = {"seq_len": 32, "type": "random", **THEIRS["data"]}
    loaded = make_config(values)
    assert loaded.job_name == "a"
    assert loaded.train.dtype == "float32"
    assert loaded.train.tf32
    assert loaded.train.deterministic
    assert loaded.train.max_grad_norm == 2.0
    assert loaded.parallel.tensor == 2
    assert loaded.parallel.sequence_parallel is True
    assert loaded.parallel.checkpoint == 0.2
    assert loaded.monitor.webhook == "https://x"
    assert loaded.monitor.webhook_kind == "feishu"
    assert (loaded.monitor.slow_rank_every, loaded.monitor.slow_rank_ratio) == (9, 1.2)
    assert (loaded.ckpt.folder, loaded.ckpt.stop_file) == ("local:x", "f")
    assert loaded.ckpt.load_path == "y"
    assert loaded.grad_scaler == SECTIONS["grad_scaler"](
        initial_scale=2.0**14, min_scale=2.0, growth_interval=10, growth_factor=3.0,
        backoff_factor=0.25, max_scale=2.0**20, hysteresis=3,
    )  # fmt: skip
    assert loaded.optimizer == SECTIONS["optimizer"](
        lr=1e-3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2
    )
    assert loaded.beta2_scheduler.c == 0.5
    assert loaded.lr_total_steps == 90
    noticed = [n.split(": ")[1].split(" has no")[0] for n in loaded.notices if "has no" in n]
    assert sorted(noticed) == sorted(NOTICED)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"norm_type": "layernorm"}}, "register a model of your own"),
        ({"model": {"num_experts": 8}}, "for mixtures of experts register"),
        ({"model": {"multiple_of": 128}}, "multiple of 256"),
        ({"model": {"drop_rate": 0.1}}, "have no dropout"),
        ({"model": {"dtype": "torch.float64"}}, "write one of torch.bfloat16"),
        ({"model": {"is_reward": True}}, "for a reward head"),
        ({"parallel": {"tensor": {"mode": "isp"}}}, "for isp, parallel.zero = 3"),
        ({"parallel": {"weight": {"size": 2}}}, "write parallel.zero = 3"),
        ({"parallel": {"pipeline": {"mode": "ZBH1"}}}, "write parallel.schedule"),
        ({"data": {"use_packed_dataset": False}}, "rows are always packed"),
        ({"data": {"max_length_per_sample": 8}}, "a sample is cut at data.seq_len"),
        ({"batch_count": 4}, "write ckpt.load_path"),
        ({"lr_scheduler": {"last_epoch": 4}}, "write ckpt.load_path"),
        (
            {"ckpt": {"save_ckpt_folder": "boto3:s3://models.1.2.3.4/a/b"}},
            "write 's3://models/a/b' and give the endpoint 1.2.3.4 with the variable AWS_ENDPOINT",
        ),
        ({"ckpt": {"save_ckpt_folder": "volc:vc://a.b/c"}}, "'s3://...'"),
        ({"ckpt": {"load_ckpt_info": {"pth": "x"}}}, "it has path, content and ckpt_type"),
        ({"ckpt": {"load_ckpt_info": {"ckpt_type": "llama"}}}, "write one of internevo"),
        ({"ckpt": {"load_ckpt_info": {"content": "all"}}}, "only the weights can be read"),
        ({"data": {"total_steps": 7}}, "train.total_steps is set to 7 here and to 100 at"),
    ],
)
def test_what_ours_cannot_do_says_what_to_write(sections: dict[str, Any], message: str) -> None:
    order = {key: sections[key] for key in sections}
    assert message in fault(**order)


@pytest.mark.parametrize(
    ("key", "value", "section", "ours", "expected"),
    [
        ("parallel", {"tensor": 4}, "parallel", "sequence_parallel", None),
        ("parallel", {"tensor": {"mode": "mtp"}}, "parallel", "sequence_parallel", False),
        ("parallel", {"zero1": -1}, "parallel", "zero", 1),
        ("parallel", {"zero1": {"size": -1, "fsdp": True}}, "parallel", "zero", 3),
        ("parallel", {"pipeline": 1}, "parallel", "pipeline", 1),
        ("ckpt", {"checkpoint_every": float("inf")}, "ckpt", "every", 0),
        ("ckpt", {"load_ckpt_folder": "local:a/49"}, "ckpt", "load_path", "local:a/49"),
        ("ckpt", {"load_ckpt_info": None}, "ckpt", "load_path", None),
        ("data", {"pack_sample_into_one": True}, "data", "packing", "window"),
        ("model", {"dtype": "torch.bfloat16"}, "train", "dtype", "bfloat16"),
        ("monitor", {"alert": {"feishu_alert_address": "u"}}, "monitor", "webhook", None),
    ],
)
def test_a_key_of_theirs_becomes_ours(
    key: str, value: dict[str, Any], section: str, ours: str, expected: object
) -> None:
    assert getattr(getattr(config(**{key: value}), section), ours) == expected


def test_keys_of_internlm2_mean_nothing_to_internlm_1_unless_set() -> None:
    first = {"type": "INTERNLM", **SIZES, "no_bias": False, "apply_post_layer_norm": False}
    values = {**SMALL, "model": first}
    assert "no_bias" not in make_config(values).model.fields
    with pytest.raises(ConfigError, match="norm_head: True is for model_type = 'INTERNLM2'"):
        make_config({**SMALL, "model": {**first, "norm_head": True}})
