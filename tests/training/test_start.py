"""Bad starts fail at once, on a line each, before any process group is made."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ilm_compile import IlmCompileError, StartError, check_start, train
from ilm_compile.training import preflight
from ilm_compile.training.model import build_model
from tests.training.jobs import tiny


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets torchrun's variables."""

    def start(world_size: int, rank: int = 0) -> None:
        for name, value in {"WORLD_SIZE": world_size, "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))

    return start


def test_a_good_start_passes_and_leaves_nothing(tmp_path: Path) -> None:
    told = check_start(tiny(tmp_path / "runs"))
    assert told.startswith("expected on 1 x cpu: ")
    assert told.endswith(" GiB on the fullest rank")
    assert list(tmp_path.iterdir()) == []


BIG = {"num_layers": 48, "hidden_size": 6144, "num_attention_heads": 48, "vocab_size": 92544}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"tensor": 2}}, "need 2 processes: torchrun --nproc-per-node 2 -m"),
        ({"parallel": {"schedule": "2f2b"}}, "unknown schedule '2f2b'; known: "),
        ({"data": {"rampup_batch_size": "4 1 2"}}, "starts with 4 rows, a full step has 2"),
        ({"data": {"rampup_batch_size": "4 1"}}, 'expected "start increment every"'),
        ({"data": {"skip_batches": "5-2"}}, 'expected numbers and ranges such as "2-5,10"'),
        ({"model": BIG}, "memory: weights, gradients and optimizer state need about"),
        ({"model": BIG}, "ckpt.folder: a checkpoint needs about"),
        ({"monitor": {"webhook": "ftp://x"}}, "expected an address that starts with https://"),
        ({"monitor": {"webhook": "env:NO_SUCH"}}, "the variable NO_SUCH is not set"),
        ({"monitor": {"command": ["no_such_program"]}}, "found no program 'no_such_program'"),
        ({"ckpt": {"folder": "nowhere://bucket/path"}}, "nowhere"),
        ({"ckpt": {"load_path": "/no/such"}}, "ckpt.load_path: found nothing at /no/such"),
        (
            {"data": {"type": "tokenized", "train_folder": "/no/such"}},
            "data.train_folder: expected a folder that can be read, found none at /no/such",
        ),
    ],
)
def test_a_bad_start_is_named(
    sections: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda place: 64 * 2.0**30)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: _Usage(free=2**30))
    monkeypatch.setattr(preflight.Start, "one_block", None)  # takes a second
    monkeypatch.setattr(preflight, "compile", lambda *program_and_plan: None)
    with pytest.raises(StartError) as error:
        train(tiny(tmp_path, **sections))
    assert message in str(error.value)
    assert not dist.is_initialized()


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize(
    ("world_size", "sections", "message"),
    [
        (
            3,
            {"parallel": {"tensor": 2}},
            "expected a multiple of parallel.tensor*parallel.pipeline",
        ),
        (3, {"parallel": {"expert": 2}}, "parallel.pipeline*parallel.expert = 2 processes, got 3"),
        (3, {"parallel": {"tensor": 3}}, "tp=3 does not divide the 4 attention heads"),
        (4, {"parallel": {"pipeline": 4}}, "4 stages need as many blocks, model.num_layers=2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    world_size: int,
    sections: dict[str, Any],
    message: str,
    tmp_path: Path,
    torchrun: Callable[..., None],
) -> None:
    torchrun(world_size)
    start = time.perf_counter()
    with pytest.raises(StartError) as error:
        train(tiny(tmp_path, **sections))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert time.perf_counter() - start < 10
    assert not dist.is_initialized()


@pytest.mark.parametrize(("experts", "fits"), [(1, False), (4, True)])
def test_a_rank_needs_memory_for_its_own_experts(
    experts: int,
    fits: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torchrun: Callable[..., None],
) -> None:
    torchrun(4)
    with torch.device("meta"):
        model = nn.ParameterList([nn.Parameter(torch.empty(8, 1024, 1024))])
    monkeypatch.setattr(preflight, "build_model", lambda config: model)
    monkeypatch.setattr(preflight.Start, "one_block", None)
    monkeypatch.setattr(preflight, "compile", lambda *program_and_plan: None)
    # 2**23 elements: weight and gradient of 8 bytes whole, moments of 8 over four ranks
    monkeypatch.setattr(preflight, "available_bytes", lambda place: 2**23 * 9.0)
    config = tiny(tmp_path, parallel={"expert": experts})
    if fits:
        check_start(config)
    else:
        with pytest.raises(StartError, match=r"memory: weights, .* 0\.1 GiB are there"):
            check_start(config)


def memory_of(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda place: num_bytes)


def read(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def test_what_cannot_fit_is_refused_with_keys_that_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torchrun: Callable[..., None]
) -> None:
    torchrun(2)
    sections = {
        "model": {"num_layers": 16, "hidden_size": 512, "num_attention_heads": 8},
        "data": {"seq_len": 4096, "micro_bsz": 8, "micro_num": 1},
    }
    config = tiny(tmp_path, **sections)
    memory_of(monkeypatch, 3.5 * 2.0**30)
    with pytest.raises(StartError) as error:
        check_start(config)
    told = str(error.value)
    assert " with half of the activations; 3.5 GiB are there; take --set " in told
    assert "parallel.check_memory=false starts it all the same" in told
    keys = [word for word in told.split() if "=" in word and "check_memory" not in word]
    changed: dict[str, Any] = {**sections}
    for key, value in (word.rstrip(",;").split("=") for word in keys):
        section, name = key.split(".")
        changed[section] = {**changed.get(section, {}), name: read(value)}
    check_start(tiny(tmp_path, **changed))
    check_start(tiny(tmp_path, **sections, parallel={"check_memory": False}))


def test_where_no_plan_fits_more_processes_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_of(monkeypatch, 2 * 2.0**30)
    sections = {"model": {"num_layers": 16, "hidden_size": 1024, "num_attention_heads": 8}}
    with pytest.raises(StartError, match=r"start [248] processes with --set parallel\."):
        check_start(tiny(tmp_path, **sections, data={"seq_len": 1024, "micro_num": 8}))


def test_what_just_fits_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path)
    held = 16.0 * sum(p.numel() for p in build_model(config).parameters())
    memory_of(monkeypatch, held * 1.2)
    check_start(config)
    memory_of(monkeypatch, held * 0.99)
    with pytest.raises(StartError, match="memory: weights"):
        check_start(config)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = tiny(
        tmp_path / "file",
        ckpt={"folder": f"local:{tmp_path / 'file'}", "load_path": "/no/such"},
        data={"skip_batches": "x"},
    )
    with pytest.raises(StartError) as error:
        check_start(config)
    told = str(error.value).splitlines()
    assert len(told) == 4
    assert f"logging.folder: {tmp_path / 'file'} is a file, expected a folder" in told[1]
    assert f"ckpt.folder: {tmp_path / 'file'} is a file, expected a folder" in told[2]


def test_a_folder_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(StartError, match=f"cannot write in {tmp_path}: Permission denied"):
        check_start(tiny(tmp_path))


def test_a_gpu_without_bfloat16_or_for_too_few_ranks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torchrun: Callable[..., None]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(preflight, "available_bytes", lambda place: 2.0**40)
    with pytest.raises(StartError, match="Tesla V100 has no bfloat16; use float32"):
        check_start(tiny(tmp_path, train={"dtype": "bfloat16"}))
    torchrun(2, rank=1)
    with pytest.raises(StartError, match="local rank 1 needs a GPU of its own"):
        check_start(tiny(tmp_path))


def test_a_run_never_adds_to_one_that_it_does_not_go_on_with(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "metrics.jsonl").write_text('{"step": 3}\n')  # one more than up to a save
    with pytest.raises(StartError, match="holds an earlier run and there is no checkpoint"):
        train(tiny(tmp_path))
    (tmp_path / "tiny" / "checkpoints" / "step-00000002").mkdir(parents=True)
    check_start(tiny(tmp_path))
    with pytest.raises(StartError, match="holds an earlier run"):
        check_start(tiny(tmp_path, ckpt={"auto_resume": False}))


def test_a_run_told_not_to_resume_needs_a_folder_without_checkpoints(tmp_path: Path) -> None:
    newest = tmp_path / "other" / "step-00000002"
    newest.mkdir(parents=True)
    ckpt = {"folder": str(tmp_path / "other"), "auto_resume": False}
    with pytest.raises(
        StartError, match=r"other holds the checkpoints of an earlier run, and with"
    ):
        check_start(tiny(tmp_path, ckpt=ckpt))
    check_start(tiny(tmp_path, ckpt={**ckpt, "load_path": str(newest)}))
    check_start(tiny(tmp_path, ckpt={**ckpt, "auto_resume": True}))
    check_start(tiny(tmp_path, ckpt={**ckpt, "enabled": False}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_flash_attention_that_this_machine_has_not_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path / "runs", train={"flash_attention": "FA3"})
    with pytest.raises(IlmCompileError, match="FA3 needs a CUDA device, and torch finds none"):
        train(config)
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []
