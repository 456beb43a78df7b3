"""Tensors that a model holds or makes in its forward, which are neither parameters nor buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from ilm_compile.errors import TraceError
from ilm_compile.program.program import Variable


def lifted_constants(exported: ExportedProgram) -> dict[str, Tensor]:
    """Return the value of each constant by the name of its placeholder.

    Raises `TraceError` for one without a value, and for one that the forward writes to.
    """
    signature = exported.graph_signature
    found = {}
    for name, fqn in signature.inputs_to_lifted_tensor_constants.items():
        constant = exported.constants[fqn]
        held = f"the tensor {fqn.removeprefix('model.')}" if fqn.startswith("model.") else ""
        if not constant.numel():
            constant = constant.new_empty(constant.shape, device="cpu")  # nothing was lost
        if constant.is_meta or isinstance(constant, FakeTensor):
            raise TraceError(
                f"trace: {held or 'a tensor that the model holds'}, of shape "
                f"{tuple(constant.shape)}, is on the meta device and no buffer: it has no value "
                "and nothing computes it. Register it with register_buffer, or build the model on "
                "the CPU"
            )
        found[name] = constant.detach()
    return found


def refuse_writes(exported: ExportedProgram, variables: Mapping[str, Variable]) -> None:
    """Raise `TraceError` if the forward writes to what outlives it: buffers, weights, inputs.

    A buffer that is no part of the state dict may be overwritten before it is read: then each
    forward makes it anew, as rotary embeddings do with their frequencies.
    """
    signature = exported.graph_signature
    read = _read_buffers(exported)
    saved = {alias for v in variables.values() if v.persistent for alias in (v.name, *v.aliases)}
    kinds = {
        "buffers": [
            n for n in signature.buffers_to_mutate.values() if n in read or _own(n) in saved
        ],
        "parameters": signature.parameters_to_mutate.values(),
        "inputs": signature.user_inputs_to_mutate.values(),
    }
    for kind, names in kinds.items():
        if written := sorted(map(_own, names)):
            raise TraceError(
                f"trace: the forward pass writes to the {kind} {written}; a pipelined step has no "
                "single place for such state. Compute the value in the forward, or update it "
                "outside"
            )


def _read_buffers(exported: ExportedProgram) -> set[str]:
    """Return the buffers whose value from before the forward has a part in it."""
    names = exported.graph_signature.inputs_to_buffers
    read = set()
    for node in exported.graph.find_nodes(op="placeholder"):
        copied = [u for u in node.users if u.target is torch.ops.aten.copy.default]
        overwritten = all(user.args[0] is node and user.args[1] is not node for user in copied)
        if node.name in names and not (overwritten and len(copied) == len(node.users)):
            read.add(names[node.name])
    return read


def _own(name: str) -> str:
    return name.removeprefix("model.")


def user_outputs(exported: ExportedProgram) -> list[int]:
    """Return which outputs are the model's own, and no state that it leaves behind."""
    specs = exported.graph_signature.output_specs
    return [i for i, spec in enumerate(specs) if spec.kind is OutputKind.USER_OUTPUT]
