"""The keys of InternEvo's configs: mapped, noticed, or refused with what to write instead."""

from pathlib import Path
from typing import Any

import pytest

from ilm_compile.config import ConfigError, make_config
from ilm_compile.config.schema import SECTIONS
from tests.config.made import SIZES, SMALL, config, fault

SAMPLES = Path(__file__).parent / "samples"


def start(info: dict[str, Any] | None) -> dict[str, Any]:
    return {"auto_resume": False, "load_ckpt_info": info}


def folder(path: str) -> dict[str, Any]:
    return {"auto_resume": False, "load_ckpt_folder": path}


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
    "use_apex_adam": False,
    "selective_checkpoint": True,
    "cpu_offloading": {"enable": True},
    "generation": {"batch_size": 1, "eos_id": [2, 0]},
    "model": {
        "num_chunks": 1, "checkpoint": 0.2, "dtype": "torch.tf32", "embed_split_hidden": True,
        "num_kv_attention_heads": 2, "mlp_ratio": 2, "multiple_of": 128, "embed_grad_scale": 0.1,
        "enable_qkv_fusion": False, "mlp_layer_fusion": True,
        "parallel_output": True, "residual_in_fp32": False, "norm_type": "rmsnorm",
        "layer_norm_epsilon": 1e-6, "qk_interleaved": False, "adapt_hf": True, "no_bias": True,
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
        "pipeline": {"size": 1, "interleaved_overlap": True, "mode": "1f1b"},
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
        "auto_resume": False, "enable_internevo2hf_ckpt": False,
        "async_upload": True, "async_upload_tmp_folder": "z",
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
    *["moe.top_k", "generation", "tensorboard.queue_max_length", "tensorboard_folder"],
    *["resume_tb_folder", "selective_checkpoint", "cpu_offloading"],
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
    assert (loaded.ckpt.load_path, loaded.ckpt.load_format) == ("y", "internlm")
    assert loaded.model.fields["multiple_of"] == 128
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
        ({"model": {"norm_type": "batchnorm"}}, "expected one of 'rmsnorm', 'layernorm'"),
        ({"model": {"num_experts": 8}}, "there are no experts in INTERNLM2; model_type is one of"),
        ({"model": {"drop_rate": 0.1}}, "have no dropout"),
        ({"model": {"dtype": "torch.float64"}}, "write one of torch.bfloat16"),
        ({"model": {"is_reward": True}}, "for a reward head"),
        ({"parallel": {"tensor": {"mode": "2D"}}}, "write mtp, msp, fsp or isp"),
        ({"parallel": {"weight": {"size": "all"}}}, "write parallel.zero = 3"),
        ({"parallel": {"pipeline": {"mode": "VHALF"}}}, "write parallel.schedule"),
        ({"data": {"use_packed_dataset": False}}, "rows are always packed"),
        ({"data": {"max_length_per_sample": 8}}, "a sample is cut at data.seq_len"),
        ({"hf": {"cfg": "m"}}, "call ilm_compile.parallelize on the Hugging Face model"),
        ({"int8_training": True}, "train.dtype is float32 or a 16-bit type"),
        ({"data": {"type": "streaming"}}, "data.type: 'streaming': tokenize first"),
        ({"batch_count": 4}, "write ckpt.load_path"),
        ({"lr_scheduler": {"last_epoch": 4}}, "write ckpt.load_path"),
        (
            {"ckpt": {"save_ckpt_folder": "boto3:s3://models.1.2.3.4/a/b"}},
            "write 's3://models/a/b' and give the endpoint 1.2.3.4 with the variable AWS_ENDPOINT",
        ),
        ({"ckpt": {"save_ckpt_folder": "volc:vc://a.b/c"}}, "'s3://...'"),
        ({"ckpt": start({"pth": "x"})}, "it has path, content and ckpt_type"),
        ({"ckpt": start({"ckpt_type": "llama"})}, "write one of internevo"),
        ({"ckpt": start({"content": "all"})}, "only the weights can be read"),
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
        ("parallel", {"fsdp": {"enable": True, "mode": "v1"}}, "parallel", "zero", 3),
        ("parallel", {"pipeline": 1}, "parallel", "pipeline", 1),
        ("parallel", {"expert": -1}, "parallel", "expert", 1),
        ("parallel", {"expert": {"size": -1, "no_tp": False}}, "parallel", "expert", 1),
        ("parallel", {"expert": 4}, "parallel", "expert", 4),
        ("ckpt", {"checkpoint_every": float("inf")}, "ckpt", "every", 0),
        ("ckpt", folder("local:a/49"), "ckpt", "load_path", "local:a/49"),
        ("ckpt", folder("local:a") | start({"path": "b"}), "ckpt", "load_path", "b"),
        ("ckpt", start(None), "ckpt", "load_path", None),
        ("ckpt", {**start({"path": "b"}), "auto_resume": True}, "ckpt", "load_path", None),
        ("ckpt", {"load_ckpt_info": {"path": "b"}}, "ckpt", "load_path", None),
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


def test_what_has_no_effect_beside_another_key_is_told() -> None:
    both = config(ckpt=folder("local:a") | start({"path": "b"}))
    assert any("load_ckpt_folder has no effect: ckpt.load_ckpt_info" in n for n in both.notices)
    resumed = config(ckpt={"load_ckpt_info": {"path": "b"}})
    assert any("write auto_resume=False to start from this one" in n for n in resumed.notices)


@pytest.mark.parametrize(
    ("file", "override", "section", "ours", "expected"),
    [
        ({"parallel": {"tensor": {"mode": "2D"}}}, "parallel.tensor.mode=fsp",
         "parallel", "sequence_parallel", True),
        ({"parallel": {"tensor": {"mode": "2D"}}}, "parallel.sequence_parallel=true",
         "parallel", "sequence_parallel", True),
        ({"parallel": {"weight": {"size": 2}}}, "parallel.zero=1",
         "parallel", "zero", 1),
        ({"parallel": {"pipeline": {"mode": "VHALF"}}}, "parallel.schedule=gpipe",
         "parallel", "schedule", "gpipe"),
        ({"parallel": {"tensor": {"size": 4, "mode": "msp"}}}, "parallel.tensor=2",
         "parallel", "tensor", 2),
        ({"parallel": {"tensor": {"size": 4, "mode": "msp"}}}, "parallel.tensor=2",
         "parallel", "sequence_parallel", True),
        ({"model": {"dtype": "torch.float64"}}, "train.dtype=bfloat16",
         "train", "dtype", "bfloat16"),
        ({"adam": {"lr": 0.5}}, "optimizer.lr=0.25", "optimizer", "lr", 0.25),
        ({"optimizer": {"lr": 0.5}}, "adam.lr=0.25", "optimizer", "lr", 0.25),
        ({"adam": {"lr": 0.5}}, "adam.lr=none", "optimizer", "lr", 3e-4),
        ({"optimizer": {"lr": 0.5}}, "adam.lr=none", "optimizer", "lr", 3e-4),
        ({"adam": {"lr": 0.5}}, "optimizer.lr=none", "optimizer", "lr", 3e-4),
        ({"ckpt": start({"ckpt_type": "llama"})}, "ckpt.load_ckpt_info=none",
         "ckpt", "load_path", None),
        ({"ckpt": {"load_ckpt_info": {"path": "b"}}}, "ckpt.auto_resume=false",
         "ckpt", "load_path", "b"),
        ({"batch_count": 4}, "batch_count=0", "train", "total_steps", 100),
        ({"parallel": {"expert": {"size": 4}}}, "parallel.expert=2", "parallel", "expert", 2),
    ],
)  # fmt: skip
def test_what_the_command_line_settles_is_no_fault_of_the_file(
    file: dict[str, Any], override: str, section: str, ours: str, expected: object
) -> None:
    assert getattr(getattr(config(override, **file), section), ours) == expected


def test_a_set_settles_no_more_than_it_says() -> None:
    order = {"tensor": {"mode": "2D"}, "pipeline": {"mode": "VHALF"}}
    text = fault("parallel.sequence_parallel=true", parallel=order)
    assert "pipeline.mode" in text
    assert "tensor.mode" not in text


@pytest.mark.parametrize(
    ("mode", "schedule", "chunks"), [("1F1B", None, 1), ("ZBH1", "zb_h1", 1), ("zbv", "zb_v", 2)]
)
def test_the_mode_of_a_pipeline_names_a_schedule(
    mode: str, schedule: str | None, chunks: int
) -> None:
    parallel = config(parallel={"pipeline": {"size": 2, "mode": mode}}).parallel
    assert (parallel.schedule, parallel.num_chunks) == (schedule, chunks)


def test_a_wrong_set_is_refused_over_a_right_file() -> None:
    text = fault("parallel.tensor.mode=2D", parallel={"tensor": {"mode": "msp"}})
    assert "--set parallel.tensor.mode=2D: parallel.tensor.mode: '2D' is not supported" in text


@pytest.mark.parametrize("mode", [{"mode": "isp"}, {"mode": "fstp"}, {"sp": "intern"}], ids=str)
def test_ranks_that_share_sequences_are_context_parallel(mode: dict[str, str]) -> None:
    parallel = config(parallel={"tensor": {"size": 2, **mode}, "weight": {"size": 4}}).parallel
    assert (parallel.tensor, parallel.context, parallel.zero) == (1, 2, 3)


def test_sequence_parallel_of_an_earlier_revision_stands_beside_the_mode() -> None:
    old = {"model": {"sequence_parallel": True}, "parallel": {"tensor": {"mode": "origin_tp"}}}
    assert config(**old).parallel.sequence_parallel is True
