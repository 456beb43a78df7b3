"""A few of `benchmarks.outside_models`, in real processes: models that nobody here wrote."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks.outside import MODELS
from benchmarks.outside.table import Row, by_source, summary, without_folders
from benchmarks.outside.train import Trained, train_both
from benchmarks.outside_models import measure
from tests.support.world import World

ROOT = Path(__file__).resolve().parents[1]
FAST = ("nanoGPT", "RWKV-v1", "vit-pytorch")


@pytest.mark.parametrize("name", FAST)
def test_trains_as_plain_pytorch_does(world4: World, name: str) -> None:
    trained = world4.run(train_both, name)[0]
    assert trained.agrees(1e-11), trained


def test_a_refused_model_is_told_with_its_reason(world4: World) -> None:
    row = measure("experts by row", world4)
    assert row.ok
    assert "moe.py" in row.refused
    assert row.cells()[4] == "refused"
    assert str(ROOT) not in row.refused


@pytest.mark.parametrize(
    "trained",
    [
        Trained(loss_error=1e-8, weight_error=0.0),
        Trained(loss_error=0.0, weight_error=1e-8),
        Trained(loss_error=0.0, weight_error=0.0, missing=("lm_head.weight",)),
        Trained(refused="the run failed: rank 1 died"),
    ],
)
def test_a_run_that_differs_is_not_ok(trained: Trained) -> None:
    assert not _row(trained=trained).ok


def test_a_run_that_agrees_is_ok_if_it_is_proved() -> None:
    equal = Trained(loss_error=1e-12, weight_error=1e-12)
    assert _row(trained=equal).ok
    assert not _row(trained=equal, proof="step: not equal").ok


def test_a_refusal_is_ok_only_where_it_must_be() -> None:
    refused = dataclasses.replace(_row(Trained()), refused="TraceError: no")
    assert not refused.ok
    assert dataclasses.replace(refused, refusal="its loop depends on values").ok
    assert not dataclasses.replace(_row(Trained(0.0, 0.0)), refusal="its loop").ok


def test_places_are_named_from_the_checkout_and_the_package_on() -> None:
    text = f"(at /opt/x/lib/site-packages/litgpt/model.py:8: at {ROOT}/tests/a.py:3)"
    assert without_folders(text) == "(at litgpt/model.py:8: at tests/a.py:3)"


def test_summaries_count_what_failed() -> None:
    rows = [_row(Trained(1e-12, 2e-11)), _row(Trained(1e-3, 0.0))]
    assert summary(rows) == "2 models: 1 equal, 0 rightly refused, 1 failed: model"
    assert list(by_source(rows))[-1] == "| source | 2 | 1 | 0 | 1 | 1e-12 | 2e-11 | 0.1 s | 0.1 s |"


def test_fifty_models_and_more_are_listed() -> None:
    assert len(MODELS) >= 50


def _row(trained: Trained, proof: str = "equal") -> Row:
    return Row(
        *("model", "source", "tp=4", 1000, 0.1, "", 1e-9),
        proof=proof,
        proof_s=0.1,
        trained=trained,
    )
