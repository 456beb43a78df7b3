"""The flags of a training, each of which does something, and what users add."""

import os
from pathlib import Path

import pytest

import ilm_compile
from ilm_compile.config import Config
from tests.training.jobs import tiny


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    tiny(tmp_path).save(path)
    return path


def parsed(*arguments: object) -> Config:
    options = ilm_compile.get_default_parser().parse_args([str(a) for a in arguments])
    return ilm_compile.config_from_arguments(options)


def test_a_user_may_add_flags(file: Path) -> None:
    parser = ilm_compile.get_default_parser()
    parser.add_argument("--note")
    options = parser.parse_args(["--config", str(file), "--note", "mine"])
    assert options.note == "mine"
    assert ilm_compile.config_from_arguments(options).job_name == "tiny"


def test_flags_go_over_the_file(file: Path) -> None:
    config = parsed("--config", file, "--seed", 7, "--profiling", "--set", "data.micro_num=6")
    assert (config.train.seed, config.profiler.enabled, config.data.micro_num) == (7, True, 6)


def test_config_root_lets_a_file_import_from_further_up(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "sizes.py").write_text("LAYERS = 3\n")
    file = tmp_path / "runs" / "main.py"
    file.write_text(
        "with read_base():\n    from ..sizes import *\nmodel_type = 'INTERNLM'\n"
        "model = dict(num_layers=LAYERS, hidden_size=8, num_attention_heads=1, vocab_size=8)\n"
        "data = dict(seq_len=8, total_steps=2)\n"
    )
    with pytest.raises(ilm_compile.ConfigError, match="imports only from its own folder"):
        parsed("--config", file)
    config = parsed("--config", file, "--config-root", tmp_path)
    assert config.model.fields["num_layers"] == 3


def test_slurm_is_read_with_host_and_port(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")  # what is written there goes away with the test
    monkeypatch.setenv("MASTER_PORT", "")
    for name, value in {"PROCID": "1", "LOCALID": "1", "NTASKS": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    parsed("--config", file, "--launcher", "slurm", "--port", 99, "--host", "h")
    assert (os.environ["RANK"], os.environ["MASTER_ADDR"]) == ("1", "h")
    assert os.environ["MASTER_PORT"] == "99"


def test_a_process_that_nothing_started_says_which_it_is(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")  # what is written there goes away with the test
        monkeypatch.delenv(name)
    numbers = ("--world_size", 4, "--rank", 3, "--local_rank", 1)
    parsed("--config", file, *numbers, "--host", "h", "--port", 99)
    assert [os.environ[name] for name in names] == ["3", "1", "4", "h", "99"]
    parsed("--config", file, "--rank", 3)  # the same again, as under torchrun
    with pytest.raises(ilm_compile.PlanError, match="--rank 2, but RANK=3 in the environment"):
        parsed("--config", file, "--rank", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", 99), "give torchrun --master-addr"),
        (("--world_size", 2), "--rank and --local_rank missing"),
        (("--rank", 0, "--launcher", "slurm"), "srun gives them"),
    ],
    ids=["port", "world_size", "slurm"],
)
def test_flags_that_do_not_fit_are_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], message: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ilm_compile.IlmCompileError, match=message):
        parsed("--config", file, *arguments)


@pytest.mark.parametrize(
    ("has_gpu", "right", "wrong"), [(True, "nccl", "gloo"), (False, "gloo", "nccl")]
)
def test_a_backend_of_another_device_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool, right: str, wrong: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    parsed("--config", file, "--backend", right)
    with pytest.raises(ilm_compile.IlmCompileError, match=f"--backend {wrong} is for"):
        parsed("--config", file, "--backend", wrong)


def test_the_parser_reads_no_config_and_a_job_needs_one() -> None:
    options = ilm_compile.get_default_parser().parse_args([])
    assert options.config is None
    with pytest.raises(ilm_compile.IlmCompileError, match="--config FILE is missing"):
        ilm_compile.config_from_arguments(options)
