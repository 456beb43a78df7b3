"""One dialect: torch.export's graph rewritten into the form every pass and rule can count on.

* parameters and buffers become `get_attr` nodes under the user's names, lifted constants buffers;
* regions that export wraps into higher-order ops (``torch.no_grad`` blocks) are inlined;
* metadata asserts, no-op casts, aliases and dead nodes are gone;
* the many ways to write a view are one ``aten.reshape`` with explicit sizes, the many casts one
  ``aten.to.dtype``, and ops that return a list (split, chunk, unbind) are slices and selects;
* device arguments are dropped, to be bound when a stage is materialised.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ilm_compile.errors import TraceError
from ilm_compile.program.dropout import SEED, attention_probabilities, seeded_dropout
from ilm_compile.program.functional import passed_through
from ilm_compile.program.lowerings import LOWERINGS
from ilm_compile.program.program import Source, Variable
from ilm_compile.program.repeats import REPEATS
from ilm_compile.program.selections import SELECTIONS
from ilm_compile.program.values import is_tuple, tensors_of

aten = torch.ops.aten

_FRAME = re.compile(r'\s*File "(?P<file>.+)", line (?P<line>\d+)')
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<eval_with_key>")


def normalize(
    exported: ExportedProgram,
    variables: dict[str, Variable],
    input_names: list[str],
    output_names: list[str],
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Return the normalised graph over meta tensors, and the names of its outputs.

    Adds lifted constants to `variables` under the name ``constant_N``. Raises `TraceError` if the
    model writes to a buffer.
    """
    signature = exported.graph_signature
    if signature.buffers_to_mutate:
        written = sorted(n.removeprefix("model.") for n in signature.buffers_to_mutate.values())
        raise TraceError(
            f"trace: the forward pass writes to the buffers {written}; a pipelined step has no "
            "single place for such state. Compute the value in the forward, or update it outside"
        )
    owners = {alias: v.name for v in variables.values() for alias in (v.name, *v.aliases)}
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    attributes = {name: owners[fqn.removeprefix("model.")] for name, fqn in lifted.items()}
    root = nn.Module()
    for name, fqn in signature.inputs_to_lifted_tensor_constants.items():
        constant = exported.constants[fqn]
        if not constant.numel():
            constant = torch.empty_like(constant, device="cpu")  # nothing was lost
        if constant.is_meta:
            raise TraceError(
                f"trace: the model makes a constant of shape {tuple(constant.shape)} in its "
                "forward, on its inputs' device; tracing without data loses its value. Make it a "
                "buffer"
            )
        attributes[name] = f"constant_{len(variables)}"
        variables[attributes[name]] = Variable(
            attributes[name], tuple(constant.shape), constant.dtype, False, False, persistent=False
        )
        root.register_buffer(attributes[name], constant.detach(), persistent=False)

    _drop_assertions(exported.graph)
    run = _Normalizer(root, variables)
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    users = [node for node in placeholders if node.name in signature.user_inputs]
    for node, name in zip(users, input_names, strict=True):
        run.values[node] = run.graph.placeholder(name)
        run.values[node].meta["val"] = node.meta["val"]
    for node in placeholders:
        if node.name in attributes:
            run.values[node] = run.attribute(attributes[node.name])
    outputs = run.inline(exported.graph, exported.graph_module)
    run.graph.output(tuple(outputs))
    graph_module = fx.GraphModule(root, run.graph)
    graph_module.graph.eliminate_dead_code()
    return graph_module, tuple(output_names)


def _drop_assertions(graph: fx.Graph) -> None:
    """Erase checks of values, and what was computed for them alone."""
    for node in graph.nodes:
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
    graph.eliminate_dead_code()


class _Normalizer:
    """Copies nodes into a new graph, rewriting each by the tables below."""

    def __init__(self, root: nn.Module, variables: dict[str, Variable]) -> None:
        self.root, self.variables = root, variables
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.attributes: dict[str, fx.Node] = {}

    def attribute(self, name: str) -> fx.Node:
        """Return the get_attr node of variable `name`, which lives on `root` as a meta tensor."""
        if name in self.attributes:
            return self.attributes[name]
        variable = self.variables[name]
        *path, leaf = name.split(".")
        owner = self.root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if not hasattr(owner, leaf):
            value = torch.empty(variable.shape, dtype=variable.dtype, device="meta")
            if variable.is_parameter:
                owner.register_parameter(leaf, nn.Parameter(value, variable.requires_grad))
            else:
                owner.register_buffer(leaf, value, persistent=variable.persistent)
        self.attributes[name] = node = self.graph.create_node("get_attr", name)
        node.meta["val"] = torch.empty(variable.shape, dtype=variable.dtype, device="meta")
        return node

    def inline(self, graph: fx.Graph, owner: nn.Module) -> list[Any]:
        """Copy the body of `graph`; its placeholders must have values. Returns its outputs."""
        for node in graph.nodes:
            if node.op == "output":
                return list(fx.node.map_arg(node.args[0], self.values.__getitem__))
            if node.op == "call_function":
                self.values[node] = self._call(node, owner)
            elif node.op == "get_attr":
                self.values[node] = getattr(owner, str(node.target))  # a wrapped sub-graph
        raise AssertionError("a graph ends with its output node")

    def _call(self, node: fx.Node, owner: nn.Module) -> Any:
        if str(node.target) in _WRAPPERS:
            return self._inline_wrapper(node, owner)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        if node.target is operator.getitem:
            pieces: Any = args[0]  # an op that returns a list has become a Python list by now
            return pieces[args[1]]
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")}
        if node.target in _FAMILIES:
            return _FAMILIES[node.target](self.emit, node, args, kwargs)
        if node.target in _DROPOUTS:
            return _DROPOUTS[node.target](self, node, args, kwargs)
        call = self.emit(node, node.target, args, kwargs)
        return self._items(node, call) if is_tuple(call) else call

    def _items(self, origin: fx.Node, call: fx.Node) -> list[fx.Node]:
        """Return a node for each result of a call that has several."""
        items = []
        for index, val in enumerate(call.meta["val"]):
            item = self.graph.create_node("call_function", operator.getitem, (call, index))
            item.meta.update(val=val, source=_source(origin))
            items.append(item)
        return items

    def _value(self, node: fx.Node) -> Any:
        return self.values[node]

    def _inline_wrapper(self, node: fx.Node, owner: nn.Module) -> list[Any]:
        gradients, position = _WRAPPERS[str(node.target)]
        body = self.values[node.args[position]]  # type: ignore[index]
        calls = [n for n in body.graph.nodes if n.op == "call_function"]
        origin = calls[-1] if calls else node  # the wrapper itself has no source
        if gradients and node.args[2]:
            raise TraceError(
                f"trace: the model turns autocast on ({_source(origin)}); remove it and ask for "
                "dtype=torch.bfloat16, which puts the casts into the graph where they can be seen"
            )
        inputs = body.graph.find_nodes(op="placeholder")
        for placeholder, operand in zip(inputs, node.args[position + 1 :], strict=True):
            self.values[placeholder] = fx.node.map_arg(operand, self._value)
        outputs = self.inline(body.graph, body)
        if gradients or node.args[0]:
            return outputs
        passed = passed_through(body)
        for index, output in enumerate(outputs):
            if index not in passed:
                val = output.meta["val"]
                outputs[index] = self.emit(origin, aten.detach.default, (output,), {}, val)
        return outputs

    def dropout(self, origin: fx.Node, x: fx.Node, probability: float) -> fx.Node:
        """Append a dropout of `x` with a salt of its own, and the seed's placeholder if need be."""
        found = [n for n in self.graph.find_nodes(op="placeholder") if n.target == SEED]
        if found:
            seed = found[0]
        else:
            with self.graph.inserting_after(list(self.graph.find_nodes(op="placeholder"))[-1]):
                seed = self.graph.placeholder(SEED)
            seed.meta["val"] = torch.empty((), dtype=torch.int64, device="meta")
        salt = len(self.graph.find_nodes(op="call_function", target=seeded_dropout))
        call = (x, seed, probability, salt, "I", "tp")
        node = self.graph.create_node("call_function", seeded_dropout, call, name="dropout")
        node.meta.update(val=x.meta["val"], source=_source(origin))
        return node

    def emit(
        self, origin: fx.Node, target: Any, args: Any, kwargs: Any = None, val: Any = None
    ) -> fx.Node:
        """Append a call that stands for (part of) `origin` and return it."""
        if not isinstance(target, torch._ops.OpOverload):
            raise TraceError(
                f"trace: the graph calls {target} ({_source(origin)}), which is no ATen and no "
                "registered op; higher-order control flow (torch.cond, flex_attention) is not "
                "supported"
            )
        if torch.Tag.nondeterministic_seeded in target.tags and target not in _SEEDED:
            raise TraceError(
                f"trace: the model draws random numbers with {target} ({_source(origin)}); only "
                "dropout is drawn so that every rank and plan draws the same. Turn it off in the "
                "model's configuration, or train with it turned off"
            )
        val = origin.meta["val"] if val is None else val
        if isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool) or _is_ragged(val):
            raise TraceError(
                f"trace: the model reads a number out of a tensor ({_source(origin)}) and goes on "
                "with it: what it computes depends on values, and a static graph cannot. Replace "
                "tensor.item(), tensor.tolist() and loops over them by torch.where or arithmetic"
            )
        several = isinstance(val, (list, tuple)) and target.namespace != "aten"
        if several and len(tensors_of(val)) == len(val) > 0:
            val = tuple(val)
        elif not isinstance(val, torch.Tensor):
            raise TraceError(
                f"trace: the graph calls {target} ({_source(origin)}), expected an op that returns "
                "one tensor; use ops that do, for example var and mean in place of var_mean"
            )
        name = target._schema.name.split("::")[1].strip("_")
        node = self.graph.create_node("call_function", target, args, kwargs or {}, name)
        node.meta["val"] = val
        node.meta["source"] = _source(origin)
        return node


_ASSERTIONS = {
    *(aten._assert_scalar.default, aten._assert_async.msg, aten._assert_async.default),
    *(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default),
    *(aten._assert_tensor_metadata.default,),
}
_FAMILIES = LOWERINGS | SELECTIONS | REPEATS
# Tagged as random, but without dropout they are not; theirs is drawn by `seeded_dropout`.
_SEEDED = {aten.scaled_dot_product_attention.default}
# Higher-order ops around a sub-graph: (whether gradients flow through, index of the sub-graph).
_WRAPPERS = {"wrap_with_set_grad_enabled": (False, 1), "wrap_with_autocast": (True, 4)}


def _source(node: fx.Node) -> Source:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    frames = map(_FRAME.match, (node.meta.get("stack_trace") or "").splitlines())
    lines = [f"{f['file']}:{f['line']}" for f in frames if f and is_users_file(f["file"])]
    return Source(path.removeprefix("model").removeprefix("."), lines[-1] if lines else "")


def _is_ragged(val: Any) -> bool:
    """Whether a tensor's shape depends on values."""
    return isinstance(val, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in val.shape)


def is_users_file(filename: str) -> bool:
    """Whether a stack frame in `filename` is the user's: not torch's, not of the capture."""
    return not filename.startswith(_NOT_THE_USERS)


def _dropout(run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, probability, training = args
    return run.dropout(node, x, probability) if probability and training else x


def _attention(
    run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    probability = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    if not probability:
        return run.emit(node, node.target, args, kwargs)
    weights, value = attention_probabilities(run.emit, node, args, kwargs)
    return run.emit(node, aten.matmul.default, (run.dropout(node, weights, probability), value))


def _native_dropout(
    run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What functionalisation makes of dropout; the mask, its second result, is for backward."""
    return [_dropout(run, node, args, kwargs), None]


_DROPOUTS: dict[Any, Callable[[_Normalizer, fx.Node, tuple[Any, ...], dict[str, Any]], Any]] = {
    aten.dropout.default: _dropout,
    aten.native_dropout.default: _native_dropout,
    aten.scaled_dot_product_attention.default: _attention,
}
