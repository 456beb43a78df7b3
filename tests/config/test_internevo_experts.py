"""InternEvo's mixtures of experts: its keys in three generations, and what is said of them."""

from pathlib import Path
from typing import Any

import pytest

from ilm_compile.config import Config, ConfigError, load_config

TEXT = """
model_type = {kind!r}
data = dict(seq_len=32, total_steps=9)
model = dict(num_layers=2, hidden_size=64, vocab_size=512, num_attention_heads=4,
             num_experts={num_experts}, {model})
adam = dict(lr=1e-4)
loss = dict({loss})
{top}
"""


def theirs(
    folder: Path,
    kind: str = "INTERNLM_MoE",
    model: str = "",
    top: str = "",
    num_experts: int = 4,
    loss: str = "",
) -> Config:
    path = folder / "c.py"
    path.write_text(
        TEXT.format(kind=kind, model=model, top=top, num_experts=num_experts, loss=loss)
    )
    return load_config(path)


def notices(config: Config, start: str) -> list[str]:
    return [notice for notice in config.notices if start in notice]


@pytest.mark.parametrize(
    ("model", "top"),
    [
        ("moe_type='GShard', top_k=2, moe_layer_kwargs=dict(capacity_factor=1.5)", ""),
        ("moe_type='GShard'", "moe = dict(top_k=2, capacity_factor=1.5)"),
        ("moe_gate_k=2, moe_capacity_factor=1.5", ""),
    ],
    ids=["moe_layer_kwargs", "moe", "model"],
)
def test_three_generations_of_keys_mean_the_same(tmp_path: Path, model: str, top: str) -> None:
    fields = theirs(tmp_path, model=model, top=top).model.fields
    assert (fields["num_experts"], fields["top_k"]) == (4, 2)
    assert (fields["capacity_factor"], fields["balance"]) == (1.5, "first")


@pytest.mark.parametrize(
    ("kind", "model", "loss", "expected"),
    [
        ("INTERNLM_MoE", "", "", {"moe_loss_coeff": 1.0, "num_kv_attention_heads": 4}),
        ("INTERNLM_MoE", "", "moe_loss_coeff=0.1", {"moe_loss_coeff": 0.1}),
        ("INTERNLM_MoE", "moe_use_residual=True", "", {"num_shared_experts": 1}),
        ("INTERNLM_MoE", "moe_drop_tokens=False", "", {"capacity_factor": 0.0}),
        (
            "INTERNLM_MoE",
            "moe_layer_kwargs=dict(drop_tokens=False, capacity_factor=2.0)",
            "",
            {"capacity_factor": 0.0},
        ),
        ("MIXTRALMOE", "num_kv_attention_heads=2, qkv_bias=False", "", {"qkv_bias": False}),
        (
            "QWEN2MOE",
            "num_kv_attention_heads=2, moe_type='Dropless'",
            "",
            {"balance": "all", "capacity_factor": 0.0, "shared_gate": "sigmoid"},
        ),
        (
            "QWEN3MOE",
            "num_kv_attention_heads=2, head_dim=32, moe_type='Dropless', "
            "moe_layer_kwargs=dict(capacity_factor=None, normalize_expert_weights=False, "
            "aux_loss_by_layer=False, scoring_func='softmax', routed_scaling_factor=1.0)",
            "",
            {"balance": "layers", "head_dim": 32, "normalize_experts": False, "qk_norm": True},
        ),
    ],
)
def test_what_they_say_of_experts_is_in_our_keys(
    tmp_path: Path, kind: str, model: str, loss: str, expected: dict[str, Any]
) -> None:
    fields = theirs(tmp_path, kind, model, loss=loss).model.fields
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("moe_type='MegaBlock'", "it drops other rows than GShard"),
        ("moe_noisy_gate_policy='Jitter'", "no noise is added"),
        ("moe_type='Dropless', moe_layer_kwargs=dict(capacity_factor=1.0)", "is moe_type='GShard'"),
        ("moe_layer_kwargs=dict(scoring_func='sigmoid')", "scores are a softmax"),
        ("moe_layer_kwargs=dict(routed_scaling_factor=2.5)", "outputs are not scaled"),
        ("moe_layer_kwargs=dict(top_q=2)", "top_q is not a key"),
        ("apply_post_layer_norm=True", "is for model_type = 'INTERNLM2'"),
        ("use_sliding_window=True", "register a model of your own"),
        ("top_k=5", "top_k=5 must lie between 1 and num_experts=4"),
    ],
)
def test_what_trains_otherwise_is_refused_by_name(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        theirs(tmp_path, model=model)


def test_weights_of_theirs_are_not_read_into_it(tmp_path: Path) -> None:
    top = "ckpt = dict(auto_resume=False, load_ckpt_info=dict(path='x', ckpt_type='internevo'))"
    with pytest.raises(
        ConfigError, match="'internlm' is not read into a model of type INTERNLM_MoE"
    ):
        theirs(tmp_path, top=top)


def test_smoothing_would_leave_out_the_routers_loss(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would leave out the routers' loss"):
        theirs(tmp_path, loss="label_smoothing=0.1")


@pytest.mark.parametrize(
    ("model", "top", "told"),
    [
        ("top_k=2", "", ["as with use_fused_gating=True", "product is in float16"]),
        ("top_k=3, dtype='torch.float32'", "", []),
        (
            "top_k=3, dtype='torch.float32'",
            "parallel = dict(tensor=dict(size=2, mode='isp'))",
            ["those of a micro-batch"],
        ),
        (
            "top_k=3, dtype='torch.float32', moe_type='Dropless', "
            "moe_layer_kwargs=dict(aux_loss_by_layer=False)",
            "",
            ["leaves out documents of zeros"],
        ),
    ],
)
def test_what_routers_do_otherwise_is_told(
    tmp_path: Path, model: str, top: str, told: list[str]
) -> None:
    config = theirs(tmp_path, model=model, top=top)
    every = ["use_fused_gating=True", "product is in", "those of a micro-batch", "of zeros"]
    found = [text for text in every if notices(config, text)]
    assert len(found) == len(told)
    assert all(notices(config, text) for text in told)


def test_where_experts_lie_changes_no_number_and_is_told(tmp_path: Path) -> None:
    top = "parallel = dict(expert=dict(size=4, no_tp=True), expert_weight=dict(size=2))"
    config = theirs(tmp_path, top=top)
    assert (config.parallel.expert, config.parallel.zero) == (1, 3)
    assert notices(config, "parallel.expert.size has no effect: it changes no number; to divide")


@pytest.mark.parametrize(("no_bias", "qkv_bias"), [(True, False), (False, True)])
def test_dense_models_of_theirs_are_decoders_of_one_expert(
    tmp_path: Path, no_bias: bool, qkv_bias: bool
) -> None:
    fields = theirs(
        tmp_path, "BAICHUAN2", f"no_bias={no_bias}, norm_head=True", num_experts=1
    ).model.fields
    assert (fields["qkv_bias"], fields["o_bias"], fields["norm_head"]) == (qkv_bias, False, True)
    assert (fields["num_experts"], fields["num_kv_attention_heads"]) == (1, 4)
