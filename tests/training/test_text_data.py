"""A run that reads text and JSON as they are, without token files."""

import json
from pathlib import Path

import pytest

import ilm_compile
from ilm_compile.config import ConfigError
from tests.training.jobs import losses, metrics, tiny, train_on


def test_text_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("Bytes are tokens. " * 40)
    data = {"type": "text", "train_folder": str(tmp_path / "text")}
    valid = {"valid_folder": str(tmp_path / "text"), "valid_every": 4}
    train_on(0, tiny(tmp_path, data={**data, **valid}))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.1
    assert metrics(tmp_path)[-1]["group"] == "valid/text"


def test_the_field_of_json_files_is_chosen_by_the_config(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "Bytes are tokens. " * 40}) + "\n")
    data = {"type": "text", "train_folder": str(tmp_path)}
    with pytest.raises(
        ilm_compile.IlmCompileError, match=r"'body' \(str\); choose one with data.js"
    ):
        ilm_compile.get_train_data_loader(tiny(tmp_path, data=data))
    config = tiny(tmp_path, "data.json_field=body", data=data)
    batch = next(ilm_compile.get_train_data_loader(config))
    assert bytes(batch["input_ids"][0, :5].tolist()) in b"Bytes are tokens. " * 2
    with pytest.raises(ConfigError, match=r"data\.json_field: .* reads no JSON"):
        tiny(tmp_path, "data.json_field=body")
