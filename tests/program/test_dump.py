"""A program as text: types, placements and module paths, and the user's line of every node."""

import importlib.util
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import FileCheck

from ilm_compile.passes import ActivationCheckpoint, PipelineSplit, TensorParallel, run_passes
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program, Source
from ilm_compile.program.trace import trace
from tests.program.samples import traced
from tests.support.tiny_model import TinyTransformer


def sharded() -> Program:
    program = replace(trace(TinyTransformer(num_blocks=2)), plan=Plan(tp=2, pp=2))
    run_passes(
        program,
        [
            TensorParallel(size=2, sequence_parallel=False),
            ActivationCheckpoint(fraction=0.5),
            PipelineSplit(num_stages=2),
        ],
    )
    return program


TRACED = """\
def forward(self, input_ids: "int64[2, 8]", labels: "int64[2, 8]", num_targets: "float32[]"):
    self.embed.weight: "float32[32, 16]"
"""
HEAD = """
    # epilogue: head
    linear_4: "float32[2, 8, 32]" = aten.linear(add_1, self.head.weight)

    # epilogue: top level
    reshape_2: "float32[16, 32]" = aten.reshape(linear_4, [16, 32])
    reshape_3: "int64[16]" = aten.reshape(labels, [16])
    cross_entropy_loss: "float32[]" = \
aten.cross_entropy_loss(reshape_2, reshape_3, None, 2, -100, 0.0)
    div_tensor: "float32[]" = aten.div.Tensor(cross_entropy_loss, num_targets)
    return (div_tensor, linear_4,)
"""


def test_traced_program() -> None:
    text = trace(TinyTransformer(num_blocks=1)).dump()
    assert text.startswith(TRACED)
    assert text.endswith(HEAD)


def test_sharded_program() -> None:
    check = FileCheck()
    check.check('def forward(self, input_ids: "int64[2, 8] I"')
    check.check('self.embed.weight: "float32[16, 16] S(0)"')
    check.check('self.blocks.0.qkv.bias: "float32[24] S(0, segments=(16, 16, 16))"')
    check.check("# stage 0, blocks.0: blocks.0.qkv")
    check.check_next("copy_1: \"float32[2, 8, 16] R\" = redistribute(rms_norm, src='I', dst='R',")
    check.check_next('linear: "float32[2, 8, 24] S(2, segments=(16, 16, 16))" = aten.linear(copy_1')
    check.check("# stage 0, blocks.0: blocks.0.out")
    check.check('linear_1: "float32[2, 8, 16] P" = aten.linear(')
    check.check_next(
        "\"float32[2, 8, 16] I\" = redistribute(linear_1, src='P', dst='I', axis='tp')"
    )
    check.check("# stage 1, blocks.1, recomputed: blocks.1.up")
    check.check("# stage 1, epilogue: head")
    check.check("vocab_cross_entropy(")
    check.run(sharded().dump())


@pytest.mark.parametrize("name", ["internlm2", "llama"])
def test_every_node_is_one_short_line_under_a_heading(name: str) -> None:
    program = traced(name)
    lines = program.dump().splitlines()
    nodes = [line for line in lines if re.match(r'    \S+: "', line)]
    placeholders = len(program.graph.find_nodes(op="placeholder"))
    assert len(nodes) == len(program.graph.nodes) - placeholders - 1
    assert max(map(len, lines)) < 200
    headings = [line for line in lines if line.startswith("    # ")]
    assert all(line != other for line, other in pairwise(headings))
    assert "    # model.layers.1: model.layers.1.mlp" in headings or name == "internlm2"


def test_strings_and_lists_are_written_as_python() -> None:
    text = traced("gpt2").dump()
    FileCheck().check("aten.pad(labels, [0, 1], 'constant', -100.0)").run(text)


USERS_FILE = """\
import torch
from torch import nn
from torch.nn import functional as F


class Users(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def forward(self, x):
        y = self.layer(x)
        y = F.silu(y) * torch.tensor(2.0, device=x.device)
        with torch.no_grad():
            z = y.mean()
        return (y[:, [0]] + z).sum()
"""


def users_model(folder: Path) -> nn.Module:
    folder.mkdir()
    file = folder / "users.py"
    file.write_text(USERS_FILE)
    spec = importlib.util.spec_from_file_location("users", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: nn.Module = module.Users()
    return model


@pytest.mark.parametrize("folder", ["project", "torch"])
def test_nodes_know_the_users_line(folder: str, tmp_path: Path) -> None:
    model = users_model(tmp_path / folder)
    program = trace(model, example_inputs={"x": ((2, 4), torch.float32)})
    found = {node.name: program.source(node) for node in program.calls()}
    file = str(tmp_path / folder / "users.py")
    assert found == {
        "linear": Source("layer.0", f"{file}:12"),
        "layer_norm": Source("layer.1", f"{file}:12"),
        "silu": Source("", f"{file}:13"),
        "full": Source("", f"{file}:13"),
        "mul": Source("", f"{file}:13"),
        "mean": Source("", f"{file}:15"),
        "detach": Source("", f"{file}:15"),
        "slice_1": Source("", f"{file}:16"),
        "add": Source("", f"{file}:16"),
        "sum_1": Source("", f"{file}:16"),
    }


class InPlace(nn.Module):
    """Writes in place, so that it is functionalised."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y += 1
        return y.sum()


def test_functionalised_nodes_know_the_users_line() -> None:
    program = trace(InPlace(), example_inputs={"x": ((2, 4), torch.float32)})
    first = InPlace.forward.__code__.co_firstlineno
    lines = [program.source(n).location.rsplit(":", 1) for n in program.calls()]
    assert lines == [[__file__, str(first + offset)] for offset in (1, 2, 3)]


@pytest.mark.parametrize("name", ["internlm2", "llama", "gpt2"])
def test_no_node_is_of_torch_or_of_the_capture(name: str) -> None:
    program = traced(name)
    torch_folder = str(Path(torch.__file__).parent)
    for node in program.calls():
        location = program.source(node).location
        assert re.search(r"\.py:\d+$", location), node
        assert not location.startswith(torch_folder), node
        assert "ilm_compile/program" not in location, node


def test_errors_point_at_a_node_by_name_module_and_line() -> None:
    program = trace(InPlace(), example_inputs={"x": ((2, 4), torch.float32)})
    line = InPlace.forward.__code__.co_firstlineno + 1
    node = next(program.calls())
    assert program.where(node) == f"node linear (linear, {__file__}:{line})"


def test_source_without_anything_is_unknown() -> None:
    assert str(Source()) == "unknown"
    assert str(Source("layers.0")) == "layers.0"
    assert str(Source("", "model.py:3")) == "model.py:3"
