"""What a checkpoint manager loads and refuses, what it checks before training, the stop file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Trainer
from ilm_compile.runtime.checkpoint import CheckpointError, CheckpointManager
from ilm_compile.runtime.checkpoint.manifest import Manifest
from ilm_compile.runtime.checkpoint.storage import LocalStorage
from tests.runtime.handmade import make_batch, make_model, make_parallel
from tests.support.checkpoint_job import Counter, Job, same

# What to load


def test_only_the_weights_if_asked(tmp_path: Path) -> None:
    one = Job(tmp_path)
    one.step()
    one.manager.save(5, wait=True)
    two = Job(tmp_path, seed=4, lr=0.7)
    assert two.manager.load(5, ("model",)) == 5
    assert same(two.weights(), one.weights())
    assert two.counter.value == 0
    assert not two.optimizer.state
    assert two.optimizer.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize(("settings", "lr"), [("saved", 0.1), ("own", 0.7)])
def test_the_numbers_of_the_optimizer_are_the_saved_ones_or_its_own(
    tmp_path: Path, settings: Any, lr: float, recwarn: pytest.WarningsRecorder
) -> None:
    one = Job(tmp_path)
    one.step()
    one.manager.save(5, wait=True)
    two = Job(tmp_path, seed=4, lr=0.7)
    assert two.manager.resume(settings=settings) == 5
    assert two.optimizer.param_groups[0]["lr"] == lr
    assert len(two.optimizer.state) == len(one.optimizer.state)
    told = [str(warning.message) for warning in recwarn]
    assert [("lr 0.1 -> 0.7; to go on" in text) for text in told] == [True] * (settings == "saved")


@pytest.mark.parametrize("call", ["load", "resume"])
def test_a_checkpoint_that_is_not_accepted_changes_nothing(tmp_path: Path, call: str) -> None:
    one = Job(tmp_path, config={"base": 1})
    one.step()
    one.manager.save(5, wait=True)
    two = Job(tmp_path, seed=4)
    before = two.weights()

    def accept(manifest: Manifest) -> None:
        raise CheckpointError(f"base={manifest.config['base']}")

    with pytest.raises(CheckpointError, match="base=1"):
        two.manager.load(5, accept=accept) if call == "load" else two.manager.resume(accept=accept)
    assert same(two.weights(), before)
    assert two.counter.value == 0


@pytest.mark.parametrize("source", ["local:{}/step-00000005", "{}/step-00000005/"])
def test_a_checkpoint_by_its_path(tmp_path: Path, source: str) -> None:
    one = Job(tmp_path / "a")
    one.manager.save(5, wait=True)
    two = Job(tmp_path / "b", seed=4)
    assert two.manager.load(source.format(tmp_path / "a")) == 5
    assert same(two.weights(), one.weights())


def test_missing_content_is_named(tmp_path: Path) -> None:
    Job(tmp_path, optimizer=None, states={}).manager.save(1, wait=True)
    with pytest.raises(CheckpointError, match="holds no counter, optimizer, only model, random"):
        Job(tmp_path).manager.resume()
    with pytest.raises(CheckpointError, match=r"expected content of .*counter.*got \['sampler'\]"):
        Job(tmp_path).manager.load(1, ("sampler",))


def test_another_optimizer_is_refused_before_anything_changes(tmp_path: Path) -> None:
    Job(tmp_path).manager.save(1, wait=True)
    parallel = make_parallel(Plan(), make_model(seed=4))
    before = parallel.full_state_dict()
    everything = [p for _, p in parallel.named_parameters() if p.requires_grad]
    one_group = torch.optim.AdamW(everything)
    two_groups = torch.optim.AdamW([{"params": everything[-1:]}, {"params": everything[:-1]}])
    for optimizer, message in (
        (one_group, "1 param groups, got 2"),
        (two_groups, "in param group"),
    ):
        with pytest.raises(CheckpointError, match=message):
            CheckpointManager(tmp_path, parallel, optimizer=optimizer).resume()
    assert same(parallel.full_state_dict(), before)


def test_another_model_is_refused_naming_the_tensor(tmp_path: Path) -> None:
    Job(tmp_path).manager.save(1, wait=True)
    tied = make_parallel(Plan(), make_model(tied=True), tied=True)
    with pytest.raises(
        CheckpointError, match=r"another model: missing \[\], unexpected \['head'\]"
    ):
        CheckpointManager(tmp_path, tied).resume()


def test_numbers_of_an_optimizer_stay_numbers(tmp_path: Path) -> None:
    """An optimizer of one's own may keep Python numbers and scalars beside tensors."""
    job = Job(tmp_path)
    name, parameter = next(iter(job.parallel.named_parameters()))
    kept: dict[str, Any] = {"count": 3, "ratio": 0.25, "on": True, "step": torch.tensor(2.0)}
    job.optimizer.state[parameter] = kept
    job.manager.save(1, wait=True)
    other = Job(tmp_path, seed=4)
    other.manager.resume()
    assert other.optimizer.state[dict(other.parallel.named_parameters())[name]] == kept


def test_a_state_of_the_optimizer_that_cannot_be_cut_is_named(tmp_path: Path) -> None:
    job = Job(tmp_path)
    _, parameter = next(iter(job.parallel.named_parameters()))
    job.optimizer.state[parameter] = {"history": torch.zeros(7)}
    with pytest.raises(CheckpointError, match=r"AdamW keeps history of embed as Tensor \(7,\)"):
        job.manager.save(1)


def test_a_state_that_is_not_json_is_named(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.counter.value = object()
    with pytest.raises(CheckpointError, match=r"state of counter \(Counter\) is not plain JSON"):
        job.manager.save(1)


def test_a_tensor_that_is_no_parameter_is_refused(tmp_path: Path) -> None:
    job = Job(tmp_path, optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(4))]))
    with pytest.raises(CheckpointError, match=r"shape \(4,\) that is no parameter"):
        job.manager.save(1)


# Before training begins


def test_a_folder_that_cannot_be_written_is_refused_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoint folder .*file/ckpt.*NotADirectory"):
        Job(tmp_path / "file" / "ckpt").manager.prepare()


@pytest.mark.parametrize(
    ("free", "kind"), [(0, CheckpointError), (6_000, CheckpointError), (20_000, UserWarning)]
)
def test_a_full_disk_is_noticed_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, kind: Any
) -> None:
    # 618 float64 weights and a buffer of 6: 5 kB, and twice the trained ones for AdamW.
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda self: free)
    job = Job(tmp_path)
    with pytest.raises(kind) if kind is CheckpointError else pytest.warns(kind) as caught:
        job.manager.prepare()
    text = str(caught.value if kind is CheckpointError else caught[0].message)
    assert "GiB are free" in text


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("volc:vc://bucket/x", "boto3:s3://BUCKET.ENDPOINT/PATH"),
        ("nowhere://bucket/x", "cannot be opened"),
        pytest.param(
            "boto3:s3://bucket.host:9000/x",
            r"ilm_compile\[s3\]",
            marks=pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed"),
        ),
        ("memory://", "expected a folder in the bucket"),
        ("local:", "expected a path"),
    ],
)
def test_a_folder_of_no_known_kind_is_refused(folder: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Job(folder)


@pytest.mark.parametrize("options", [{"every": -1}, {"keep_last": 0}, {"keep_every": -1}])
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="expected every >= 0"):
        Job(tmp_path, **options)


def test_a_name_of_a_state_must_not_be_taken(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'model'"):
        Job(tmp_path, states={"model": Counter()})


# The stop file


@pytest.mark.parametrize(
    ("text", "last", "saved"),
    [
        ("+3", 3, ["step-00000003"]),
        ("3\n", 3, ["step-00000003"]),
        ("-3", 6, ["step-00000003"]),
        ("0", 6, []),
        ("", 6, []),
    ],
)
def test_the_stop_file(tmp_path: Path, text: str, last: int, saved: list[str]) -> None:
    job = Job(tmp_path / "ckpt", stop_file=tmp_path / "deep" / "stop")
    job.manager.prepare()
    assert (tmp_path / "deep" / "stop").read_text() == "0\n"
    (tmp_path / "deep" / "stop").write_text(text)
    assert len(job.train(1, 6)) == last
    folder = tmp_path / "ckpt"
    assert sorted(p.name for p in folder.iterdir()) == saved


@pytest.mark.parametrize(
    ("text", "message"),
    [("soon", "expected .*'soon'"), ("+1", "step 1 has passed, this is step 2")],
)
def test_a_stop_file_without_effect_is_warned_of_once(
    tmp_path: Path, text: str, message: str
) -> None:
    job = Job(tmp_path / "ckpt", stop_file=tmp_path / "stop")
    job.manager.prepare()
    (tmp_path / "stop").write_text(text)
    with pytest.warns(UserWarning, match=message) as caught:
        assert not any(job.manager.after_step(step) for step in (2, 3, 4))
    assert len(caught) == 1


@pytest.mark.parametrize("text", ["+2", "-2"])
def test_the_stop_file_ends_a_fit(tmp_path: Path, text: str) -> None:
    job = Job(tmp_path / "ckpt", stop_file=tmp_path / "stop")
    job.manager.prepare()
    (tmp_path / "stop").write_text(text)
    trainer = Trainer(job.parallel, optimizer=job.optimizer, hooks=[job.manager])
    history = trainer.fit([make_batch(2)] * 4, 4, progress=False)
    assert len(history) == (2 if text == "+2" else 4)
    names = sorted(p.name for p in (tmp_path / "ckpt").iterdir())
    assert names == (["step-00000002"] if text == "+2" else ["step-00000002", "step-00000004"])
