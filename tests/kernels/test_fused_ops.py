"""What every fused op promises beside its numbers: one node, exportable, of any strides."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels import add_layer_norm, add_rms_norm, glu, layer_norm, rms_norm
from ilm_compile.kernels.library import LAUNCHERS, launcher, on_cuda

BATCH, SEQ, WIDTH = 2, 3, 16
ilm = torch.ops.ilm


@dataclass(frozen=True)
class Op:
    """An op as a function of `num_rows` tensors (..., WIDTH) and, if it has one, a weight.

    backward: the op that is its backward, if not that of its name.
    """

    name: str
    function: Callable[..., Tensor | tuple[Tensor, Tensor]]
    num_rows: int
    weighted: bool
    backward: str = ""

    def inputs(self, dtype: torch.dtype = torch.float32, shape=(BATCH, SEQ, WIDTH)) -> list[Tensor]:
        torch.manual_seed(0)
        shapes = [shape] * self.num_rows + [(WIDTH,)] * self.weighted
        return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]

    def outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.function(*inputs)
        return (found,) if isinstance(found, Tensor) else found


def biased(function: Callable[..., Any]) -> Callable[..., Any]:
    """A layer norm whose bias is its weight, with the arguments that `Op` gives."""
    return lambda *inputs: function(*inputs, inputs[-1], 1e-5)


OPS = [
    Op("rms_norm", partial(rms_norm, eps=1e-5), 1, True),
    Op("rms_norm", lambda x: rms_norm(x, None, 1e-5), 1, False),
    Op("rms_norm", partial(rms_norm, eps=1e-5, weight_offset=1.0), 1, True),
    Op("add_rms_norm", partial(add_rms_norm, eps=1e-5), 2, True),
    Op("add_rms_norm", lambda x, residual: add_rms_norm(x, residual, None, 1e-5), 2, False),
    Op("layer_norm", biased(layer_norm), 1, True),
    Op("layer_norm", lambda x: layer_norm(x, None, None, 1e-5), 1, False),
    Op("add_layer_norm", biased(add_layer_norm), 2, True, "layer_norm_backward"),
    Op("glu", glu, 2, False),
    Op("glu", partial(glu, activation="gelu"), 2, False),
    Op("glu", partial(glu, activation="gelu_tanh"), 2, False),
]
NAMES = [
    *("rms_norm", "unweighted", "offset", "add_rms_norm", "add unweighted"),
    *("layer_norm", "layer_norm unweighted", "add_layer_norm"),
    *("swiglu", "geglu", "geglu tanh"),
]
every_op = pytest.mark.parametrize("op", OPS, ids=NAMES)


def gradients(op: Op, inputs: list[Tensor], function=None) -> list[Tensor]:
    """Of a sum of the outputs with random coefficients."""
    outputs = (function or op.outputs)(*inputs)
    torch.manual_seed(1)
    coefficients = [torch.randn(out.shape, dtype=torch.float64).to(out.dtype) for out in outputs]
    return list(torch.autograd.grad(outputs, inputs, coefficients))


@every_op
def test_gradients_are_those_of_finite_differences(op):
    assert torch.autograd.gradcheck(op.outputs, op.inputs(torch.float64))


OPCHECKS = {
    "rms_norm": lambda x, w: (ilm.rms_norm.default, (x, w, 1e-5)),
    "rms_norm cast": lambda x, w: (ilm.rms_norm.default, (x, w, 1e-5, True, 1.0)),
    "rms_norm unweighted": lambda x, w: (ilm.rms_norm.default, (x, None, 1e-5)),
    "rms_norm_backward": lambda x, w: (
        ilm.rms_norm_backward.default,
        (x.detach(), x.detach(), w.detach(), 1e-5, True, 0.0),
    ),
    "rms_norm_backward unweighted": lambda x, w: (
        ilm.rms_norm_backward.default,
        (x.detach(), x.detach(), None, 1e-5, False, 0.0),
    ),
    "add_rms_norm": lambda x, w: (ilm.add_rms_norm.default, (x, x, w, 1e-5)),
    "add_rms_norm mixed": lambda x, w: (
        ilm.add_rms_norm.default,
        (x.detach().bfloat16().requires_grad_(), x, w, 1e-5, True),
    ),
    "add_rms_norm_backward": lambda x, w: (
        ilm.add_rms_norm_backward.default,
        (x.detach(), None, x.detach(), w.detach(), 1e-5, False, 0.0),
    ),
    "add_rms_norm_backward mixed": lambda x, w: (
        ilm.add_rms_norm_backward.default,
        (x.detach().bfloat16(), x.detach(), x.detach(), w.detach(), 1e-5, False, 0.0),
    ),
    "layer_norm": lambda x, w: (ilm.layer_norm.default, (x, w, w, 1e-5)),
    "add_layer_norm": lambda x, w: (ilm.add_layer_norm.default, (x, x, w, None, 1e-5)),
    "layer_norm_backward": lambda x, w: (
        ilm.layer_norm_backward.default,
        (x.detach(), x.detach(), x.detach(), w.detach(), True, 1e-5),
    ),
    "layer_norm_backward unweighted": lambda x, w: (
        ilm.layer_norm_backward.default,
        (x.detach(), None, x.detach(), None, False, 1e-5),
    ),
    "glu": lambda x, w: (ilm.glu.default, (x, x, "gelu_tanh")),
    "glu_backward": lambda x, w: (ilm.glu_backward.default, (*(x.detach(),) * 3, "gelu")),
}


@pytest.mark.parametrize("case", OPCHECKS.values(), ids=list(OPCHECKS))
def test_opcheck(case):
    x, weight = (torch.randn(s, requires_grad=True) for s in ((BATCH, WIDTH), (WIDTH,)))
    torch.library.opcheck(*case(x, weight))


@every_op
def test_compiles_as_one_graph(op):
    compiled = torch.compile(op.outputs, backend="aot_eager", fullgraph=True)
    inputs = op.inputs()
    for mine, eager in zip(gradients(op, inputs, compiled), gradients(op, inputs), strict=True):
        torch.testing.assert_close(mine, eager)
    torch.compiler.reset()


@every_op
def test_exports_with_dynamic_batch_and_length(op):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return op.outputs(*inputs)

    inputs = tuple(x.detach() for x in op.inputs())
    dynamic = [{0: Dim("batch"), 1: Dim("length")} if x.dim() == 3 else None for x in inputs]
    program = export(Module(), inputs, dynamic_shapes=((*dynamic,),))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert getattr(ilm, op.name).default in calls
    larger = tuple(x.detach() for x in op.inputs(shape=(5, 7, WIDTH)))
    for mine, eager in zip(program.module()(*larger), op.outputs(*larger), strict=True):
        torch.testing.assert_close(mine, eager)


class CountCalls(TorchDispatchMode):
    """How often an op runs, and the arguments of the last call."""

    def __init__(self, op):
        super().__init__()
        self.op, self.count, self.args = op, 0, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.op:
            self.count, self.args = self.count + 1, args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("saved", "calls"), [(True, 1), (False, 2)], ids=["saved", "recomputed"])
@every_op
def test_selective_checkpointing(op, saved, calls):
    overload = getattr(ilm, op.name).default
    inputs = op.inputs()
    contexts = partial(create_selective_checkpoint_contexts, [overload] if saved else [])

    def checkpointed(*inputs):
        return checkpoint(
            lambda *xs: tuple(out.sin() for out in op.outputs(*xs)),
            *inputs,
            use_reentrant=False,
            context_fn=contexts,
        )

    def plain(*inputs):
        return tuple(out.sin() for out in op.outputs(*inputs))

    with CountCalls(overload) as counted:
        found = gradients(op, inputs, checkpointed)
    assert counted.count == calls
    for mine, other in zip(found, gradients(op, inputs, plain), strict=True):
        assert torch.equal(mine, other)


@every_op
def test_backward_saves_its_inputs_only(op):
    saved = []
    inputs = op.inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        outputs = op.outputs(*inputs)
    known = {x.data_ptr() for x in (*inputs, *outputs)}
    assert saved
    assert {x.data_ptr() for x in saved} <= known
    rows = [x for x in saved if x.dim() == 3]
    assert len(rows) == (2 if op.name == "glu" else 1)


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dim strided": lambda x: x.mT.contiguous().mT,
    "half of a projection": lambda x: torch.cat([x, x], -1)[..., :WIDTH],
    "every second row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("lay", STRIDES.values(), ids=list(STRIDES))
@every_op
def test_any_strides(op, lay):
    plain = op.inputs()
    strided = [lay(x.detach()).requires_grad_() if x.dim() == 3 else x for x in plain]
    assert not strided[0].is_contiguous()
    for mine, other in zip(op.outputs(*strided), op.outputs(*plain), strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, other)
    for mine, other in zip(gradients(op, strided), gradients(op, plain), strict=True):
        torch.testing.assert_close(mine, other)


@every_op
def test_expanded_gradient(op):
    inputs = op.inputs()
    total = sum(out.sum() for out in op.outputs(*inputs))  # gradients of stride 0
    ones = [torch.ones_like(out) for out in op.outputs(*inputs)]
    expected = torch.autograd.grad(op.outputs(*inputs), inputs, ones)
    for mine, other in zip(torch.autograd.grad(total, inputs), expected, strict=True):
        torch.testing.assert_close(mine, other)


@every_op
def test_no_rows(op):
    inputs = op.inputs(shape=(0, SEQ, WIDTH))
    assert all(out.shape == (0, SEQ, WIDTH) for out in op.outputs(*inputs))
    for x, grad in zip(inputs, gradients(op, inputs), strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


@every_op
def test_inputs_are_left_alone(op):
    inputs = op.inputs()
    before = [x.detach().clone() for x in inputs]
    gradients(op, inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@every_op
def test_the_backward_is_one_op(op):
    inputs = op.inputs()
    outputs = op.outputs(*inputs)
    with CountCalls(getattr(ilm, op.backward or f"{op.name}_backward").default) as counted:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs])
    assert counted.count == 1


def test_an_unused_sum_brings_no_tensor_of_zeros():
    inputs = [x.requires_grad_() for x in (torch.ones(2, 4), torch.ones(2, 4), torch.ones(4))]
    y, _ = add_rms_norm(*inputs, 1e-5)
    with CountCalls(ilm.add_rms_norm_backward.default) as counted:
        torch.autograd.grad(y.sum(), inputs)
    assert counted.count == 1
    assert counted.args[1] is None


@every_op
def test_symbolic_trace_records_one_node(op):
    arities = {
        1: lambda a: op.function(a),
        2: lambda a, b: op.function(a, b),
        3: lambda a, b, c: op.function(a, b, c),
    }
    traced = torch.fx.symbolic_trace(arities[len(op.inputs())])
    calls = [n.target for n in traced.graph.nodes if "ilm" in str(n.target)]
    assert len(calls) == 1
    inputs = op.inputs()
    found = traced(*inputs)
    for mine, other in zip(
        (found,) if isinstance(found, Tensor) else found, op.outputs(*inputs), strict=True
    ):
        assert torch.equal(mine, other)


@every_op
def test_meta_tensors(op):
    with FakeTensorMode():
        fakes = [torch.empty(x.shape, dtype=x.dtype) for x in op.inputs()]
        shapes = [(out.shape, out.dtype) for out in op.outputs(*fakes)]
    metas = op.outputs(*(x.detach().to("meta") for x in op.inputs()))
    real = op.outputs(*op.inputs())
    assert shapes == [(out.shape, out.dtype) for out in real]
    assert shapes == [(out.shape, out.dtype) for out in metas]


def test_importing_the_package_imports_no_kernel_library():
    program = "import sys, ilm_compile.kernels; print({'triton', 'flash_attn'} & set(sys.modules))"
    command = [sys.executable, "-c", program]  # ilm_compile itself is imported first
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"


def test_missing_triton_is_named(monkeypatch):
    # None in sys.modules makes an import fail as if nothing were installed
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in list(sys.modules):
        if name.startswith(("triton.", "ilm_compile.kernels.triton_")):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(IlmCompileError, match=r"ilm::rms_norm: expected triton.*pip install"):
        launcher("ilm::rms_norm", "ilm_compile.kernels.triton_rms_norm:rms_norm")


def test_cuda_runs_the_launcher_and_the_reference_in_float64(monkeypatch):
    monkeypatch.setitem(LAUNCHERS, "ilm::of_a_test", "operator:add")
    run = on_cuda("ilm::of_a_test", torch.sub)
    ones = torch.ones(2)
    assert run(ones, ones).tolist() == [2.0, 2.0]
    assert run(ones, ones.double()).tolist() == [0.0, 0.0]
