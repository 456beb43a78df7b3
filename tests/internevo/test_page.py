"""The calls of InternEvo's training page as they are written there, and a config of theirs."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ilm_compile
import ilm_compile.internevo as internlm
from ilm_compile.internevo import job
from ilm_compile.runtime.data import write_shard

# The keys of their 7B config, no model_type among them, with small numbers.
CONFIG = """
JOB_NAME = "small"
SEQ_LEN = 16
HIDDEN_SIZE = 32
ckpt = dict(
    enable_save_ckpt=False,
    load_ckpt_folder="local:llm_ckpts/",
    load_ckpt_info=dict(path="local:llm_ckpts/x", content=("model",), ckpt_type="internevo"),
    auto_resume=True,
    checkpoint_every=50,
)
data = dict(
    seq_len=SEQ_LEN, micro_num=2, micro_bsz=2, valid_micro_num=4, valid_every=0,
    pack_sample_into_one={window}, total_steps=4, skip_batches="", min_length=0,
    train_folder={folder!r},
)
hybrid_zero_optimizer = dict(overlap_sync_grad=True, clip_grad_norm=1.0)
adam = dict(lr=1e-2, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, weight_decay=0.01)
lr_scheduler = dict(total_steps=data["total_steps"], warmup_ratio=0.25, eta_min=1e-3, last_epoch=-1)
beta2_scheduler = dict(init_beta2=adam["adam_beta2"], c=adam["adam_beta2_c"], cur_iter=-1)
use_fp32_norm = False
model = dict(
    checkpoint=False, num_attention_heads=4, embed_split_hidden=True, vocab_size=64,
    embed_grad_scale=1, parallel_output=True, hidden_size=HIDDEN_SIZE, num_layers=2, mlp_ratio=2,
    apply_post_layer_norm=False, dtype="torch.float32", norm_type={norm!r},
    layer_norm_epsilon=1e-5, use_flash_attn=True, num_chunks=1,
)
parallel = dict(zero1=dict(size=-1), tensor=dict(size=1, mode="mtp"), pipeline=dict(size=1))
"""


@pytest.fixture(autouse=True)
def no_config_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "_CONFIGS", [])
    return


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path, "rmsnorm")


def write(folder: Path, norm: str, *, window: bool = False) -> Path:
    tokens = [[1 + (start * 7 + step * 3) % 63 for step in range(20)] for start in range(64)]
    write_shard(folder / "data" / "en" / "a.bin", tokens)
    path = folder / "small.py"
    path.write_text(CONFIG.format(folder=str(folder / "data"), norm=norm, window=window))
    return path


def the_page(file: Path) -> list[tuple[Tensor, bool, dict[str, float]]]:
    """InternEvo's train.py, in short."""
    parser = internlm.initialize.get_default_parser()
    parser.add_argument("--user_arg", type=int, default=-1, help="arguments add by user.")
    arguments = parser.parse_args(["--config", str(file), "--launcher", "torch", "--seed", "7"])
    internlm.initialize.initialize_distributed_env(
        config=arguments.config,
        launcher=arguments.launcher,
        master_port=arguments.port,
        seed=arguments.seed,
    )
    model = internlm.train.initialize_model()
    optimizer, beta2_scheduler, lr_scheduler = internlm.train.initialize_optimizer(model=model)
    train_dl, dataset_types = internlm.train.get_train_data_loader(num_worker=0)
    assert dataset_types == ["en"]
    trainer, train_dl, test_dl, scheduler = internlm.initialize.initialize_trainer(
        model=model,
        optimizer=optimizer,
        criterion=None,
        train_dataloader=train_dl,
        lr_scheduler=lr_scheduler,
        beta2_scheduler=beta2_scheduler,
    )
    assert test_dl is None
    assert scheduler is lr_scheduler
    trainer.train()
    assert not trainer.uses_pipeline
    train_iter, found = iter(train_dl), []
    for _ in range(4):
        trainer.zero_grad()
        _, _, loss = trainer.execute_schedule(
            train_iter, forward_only=False, return_loss=True, return_output_label=False
        )
        success, norms = trainer.step()
        found.append((loss, success, norms))
    return found


def test_the_page_trains_as_our_own_functions_do(file: Path) -> None:
    config = ilm_compile.load_config(file, ["train.seed=7"])
    parallel = ilm_compile.initialize_model(config)
    optimizer, beta2_scheduler, lr_scheduler = ilm_compile.initialize_optimizer(config, parallel)
    trainer = ilm_compile.initialize_trainer(
        config, parallel, optimizer, beta2_scheduler=beta2_scheduler, lr_scheduler=lr_scheduler
    )
    history = trainer.fit(ilm_compile.get_train_data_loader(config), 4, progress=False)
    found = the_page(file)
    assert [loss.item() for loss, _, _ in found] == [step.loss for step in history]
    assert [norms for _, _, norms in found] == [{"0_default": step.grad_norm} for step in history]
    assert all(success for _, success, _ in found)


def test_norm_type_layernorm_trains(tmp_path: Path) -> None:
    losses = [loss.item() for loss, _, _ in the_page(write(tmp_path, "layernorm"))]
    assert losses[-1] < losses[0]


def test_the_optimizer_of_a_config_of_theirs_is_theirs(file: Path) -> None:
    internlm.initialize.launch_from_torch(file)
    optimizer, _, schedule = internlm.train.initialize_optimizer(internlm.train.initialize_model())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01]
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    cosine = [1e-3 + 9e-3 * (1 + math.cos(math.pi * u / 3)) / 2 for u in (0, 1, 2)]
    assert rates == pytest.approx([1e-2, *cosine])


def test_windows_of_a_config_of_theirs_end_with_each_pack_and_document(tmp_path: Path) -> None:
    internlm.initialize.launch_from_torch(write(tmp_path, "rmsnorm", window=True))
    batches, _ = internlm.train.get_train_data_loader()
    labels = torch.cat([next(batches)["labels"] for _ in range(20)])
    rows = range(1, 81)
    ends = [row for row in rows if row % 2 == 0 or row * 16 % 20 == 0]
    assert int((labels[:, -1] == -100).sum()) == len(ends)


def test_a_step_without_finite_gradients_is_no_success(file: Path) -> None:
    internlm.initialize.launch_from_torch(str(file))
    model = internlm.train.initialize_model()
    optimizer, *_ = internlm.train.initialize_optimizer(model)
    trainer, *_ = internlm.initialize.initialize_trainer(model, optimizer)
    batch = next(internlm.train.build_train_loader_with_data_type()[0])
    output, label, loss = trainer.execute_schedule(batch)
    assert output.shape == (4 * 16, 64)
    assert int(batch["position_ids"].max()) == 15  # texts of 20 are cut after 16
    assert label.shape == (2, 32)  # one row of a micro-batch
    next(iter(dict(model.named_parameters()).values())).grad.fill_(math.nan)
    success, norms = trainer.step()
    assert not success
    assert math.isnan(norms["0_default"])
    assert trainer.eval().execute_schedule(batch, forward_only=True, return_output_label=False)[
        2
    ].item() == pytest.approx(loss.item())


def test_a_mapping_has_the_defaults_of_their_files(file: Path) -> None:
    values = {
        "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 8},
        "data": {"seq_len": 8, "total_steps": 2},
    }
    internlm.initialize.initialize_distributed_env(values, "torch", args_check=False)
    assert job.get_config().model.type == "INTERNLM"
    assert job.get_config().train.dtype == "float16"


def test_the_notices_are_told_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    internlm.initialize.launch_from_torch(file)
    told = capsys.readouterr().err
    assert told.count("load_ckpt_info has no effect") == 1


def test_the_functions_around_the_model_are_called(file: Path) -> None:
    internlm.initialize.launch_from_torch(file)
    seen: list[object] = []
    internlm.train.initialize_model(lambda: "before", seen.append)
    assert seen == ["before"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: internlm.train.initialize_model(), "call initialize_distributed_env"),
        (
            lambda: internlm.initialize.initialize_trainer(None, None, criterion=math.exp),
            "the loss is compiled with the model",
        ),
        (
            lambda: internlm.initialize.initialize_trainer(None, None, scheduler_hooks=[1]),
            "are InternEvo's own",
        ),
        (
            lambda: internlm.train.get_train_data_loader(train_sampler=iter),
            "train_sampler is for InternEvo's data sets",
        ),
        (
            lambda: internlm.initialize.initialize_distributed_env("c.py", launcher="mpi"),
            "expected a launcher of torch, slurm, got 'mpi'",
        ),
    ],
    ids=["no config", "criterion", "hooks", "sampler", "launcher"],
)
def test_what_cannot_be_done_is_refused(call, message: str) -> None:
    with pytest.raises(ilm_compile.IlmCompileError, match=message):
        call()
