"""The configs of examples/: each loads, is partitioned from meta and proven; samples build too."""

from dataclasses import replace
from pathlib import Path

import pytest

import ilm_compile
from ilm_compile.config import Config, load_config
from ilm_compile.training.model import build_model, input_spec, loss_function

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.toml"))
CONFIGS = [path for path in CONFIGS if path.stem != "chat_hf"]  # trained in test_hf
SAMPLES = sorted((ROOT / "tests" / "config" / "samples").glob("*.py"))
PARAMETERS = {
    "internlm2_1_8b": 1_889_110_016,
    "internlm2_7b": 7_737_708_544,
    "internlm2_20b": 19_861_149_696,
    "internlm_7b": 7_321_948_160,
    "tiny_cpu": 657_024,
}


def with_layers(config: Config, num_layers: int) -> Config:
    fields = {**config.model.fields, "num_layers": num_layers}
    return replace(config, model=replace(config.model, fields=fields))


def test_there_is_a_config_for_each_job() -> None:
    assert {path.stem for path in CONFIGS} == set(PARAMETERS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_proven_before_launch(path: Path) -> None:
    config = load_config(path)
    assert config.notices == ()
    assert config.job_name == path.stem
    model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[path.stem]
    small = with_layers(config, min(config.model.fields["num_layers"], 8))
    report = ilm_compile.verify(
        build_model(small),
        plan=config.plan().replace(num_microbatches=4),
        example_inputs=input_spec(config),
        loss_fn=loss_function(config),
        dp=2,
    )
    report.raise_if_failed()


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_file_of_internevo_builds_and_is_partitioned(path: Path) -> None:
    config = load_config(path)
    small = with_layers(config, 4)
    program = ilm_compile.partition(
        build_model(small), plan=config.plan(), example_inputs=input_spec(small)
    )
    assert f"num_microbatches={config.data.micro_num}" in program.explain()
