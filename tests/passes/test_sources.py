"""Saved stage sources: readable, importable, and the same computation."""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ilm_compile.passes import (
    ActivationCheckpoint,
    PipelineSplit,
    TensorParallel,
    lower,
    run_passes,
    save_sources,
)
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.program.trace import trace
from tests.support.models import random_tokens
from tests.support.stages import staged_outputs_and_grads
from tests.support.tiny_model import SEQ, VOCAB, TinyTransformer


@pytest.fixture
def model() -> TinyTransformer:
    torch.manual_seed(0)
    return TinyTransformer(skip=True, tied=True).double()


def compiled(model: TinyTransformer, *, tp: int = 1) -> LoweredProgram:
    program = trace(model)
    run_passes(
        program,
        [
            TensorParallel(size=tp),
            ActivationCheckpoint(fraction=0.5),
            PipelineSplit(num_stages=2),
        ],
    )
    return lower(program)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_saved_code_gives_the_same_result(model: TinyTransformer, tmp_path: Path) -> None:
    ids, labels = random_tokens(2, SEQ, VOCAB)
    batch = {"input_ids": ids, "labels": labels}
    expected = staged_outputs_and_grads(compiled(model), model, batch)
    lowered = compiled(model)
    modules = [load(path) for path in save_sources(lowered, tmp_path)]
    for stage, module in zip(lowered.stages, modules, strict=True):
        module.install(stage.module)
    found = staged_outputs_and_grads(lowered, model, batch)
    for got, want in zip(found, expected, strict=True):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_live_modules_run_the_lines_of_the_file(model: TinyTransformer, tmp_path: Path) -> None:
    lowered = compiled(model)
    (first, _) = save_sources(lowered, tmp_path)
    first.write_text(first.read_text().replace("return (", "raise EOFError\n    return (", 1))
    load(first).install(lowered.stages[0].module)
    batch = dict(zip(("input_ids", "labels"), random_tokens(2, SEQ, VOCAB), strict=True))
    with pytest.raises(EOFError):
        staged_outputs_and_grads(lowered, model, batch)
    functions = load(first).FORWARDS.values()
    assert {inspect.getsourcefile(function) for function in functions} == {str(first)}


def test_file_names_modules_lines_and_interface(model: TinyTransformer, tmp_path: Path) -> None:
    first, second = (path.read_text() for path in save_sources(compiled(model), tmp_path / "new"))
    assert first.startswith('"""Stage 0 of 2, generated: takes input_ids; returns ')
    assert "returns loss, logits." in second.splitlines()[0]
    assert "    # blocks.0.qkv, " in first
    assert "tiny_model.py:2" in first
    assert "def blocks_0(self, " in first
    assert '    "blocks_1.body": blocks_1,' in first  # recomputed


def test_collectives_are_imported(model: TinyTransformer, tmp_path: Path) -> None:
    paths = save_sources(compiled(model, tp=2), tmp_path)
    assert "import redistribute as" in paths[0].read_text()
    assert all(load(path).FORWARDS for path in paths)
