"""One dialect: torch.export's graph rewritten into the form every pass and rule can count on.

* parameters and buffers become `get_attr` nodes under the user's names, lifted constants buffers;
* regions that export wraps into higher-order ops (``torch.no_grad`` blocks) are inlined;
* metadata asserts, no-op casts, aliases and dead nodes are gone;
* the many ways to write a view are one ``aten.reshape`` with explicit sizes, the many casts one
  ``aten.to.dtype``, and ops that return a list (split, chunk, unbind) are slices and selects;
* device arguments are dropped, to be bound when a stage is materialised;
* a size that depends on values, but that the program itself says, is that number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from ilm_compile.errors import TraceError
from ilm_compile.program.attributes import put_tensor
from ilm_compile.program.dropout import SEED, attention_probabilities, seeded_dropout
from ilm_compile.program.functional import passed_through
from ilm_compile.program.lifted import lifted_constants, refuse_writes, user_outputs
from ilm_compile.program.lowerings import LOWERINGS
from ilm_compile.program.program import Variable
from ilm_compile.program.randomness import refuse_random
from ilm_compile.program.repeats import REPEATS
from ilm_compile.program.selections import SELECTIONS
from ilm_compile.program.users_line import source_of
from ilm_compile.program.values import is_tuple, tensors_of, without_data

aten = torch.ops.aten


def normalize(
    exported: ExportedProgram,
    variables: dict[str, Variable],
    input_names: list[str],
    output_names: list[str],
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Return the normalised graph over meta tensors, and the names of its outputs.

    Adds lifted constants to `variables` under the name ``constant_N``; a number becomes a fill.
    Raises `TraceError` if the model writes to a buffer, a parameter or an input.
    """
    refuse_writes(exported, variables)
    _drop_devices(exported.graph_module)
    signature = exported.graph_signature
    owners = {alias: v.name for v in variables.values() for alias in (v.name, *v.aliases)}
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    attributes = {name: owners[fqn.removeprefix("model.")] for name, fqn in lifted.items()}
    root = nn.Module()
    constants = lifted_constants(exported)
    for name, constant in constants.items():
        if not constant.dim():
            continue  # a number
        attributes[name] = f"constant_{len(variables)}"
        variables[attributes[name]] = Variable(
            attributes[name], tuple(constant.shape), constant.dtype, False, False, persistent=False
        )
        root.register_buffer(attributes[name], constant, persistent=False)

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
        elif node.name in constants:
            number = constants[node.name]
            fill: Any = ([], number.item())
            user = next(iter(node.users), node)  # it knows the line
            dtype, val = {"dtype": number.dtype}, node.meta["val"]
            run.values[node] = run.emit(user, aten.full.default, fill, dtype, val)
    outputs = run.inline(exported.graph, exported.graph_module)
    run.graph.output(tuple(outputs[index] for index in user_outputs(exported)))
    graph_module = _LazyGraphModule(root, run.graph)  # its code is made when it is asked for
    graph_module.graph.eliminate_dead_code()
    return graph_module, tuple(output_names)


def _drop_devices(root: nn.Module) -> None:
    """Turn every value into one on the meta device: a program says nothing of devices."""
    for module in root.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            values = tensors_of(node.meta.get("val"))
            if values and not any(map(_is_ragged, values)):
                val = node.meta["val"]
                several = type(val) if isinstance(val, (list, tuple)) else None
                node.meta["val"] = several(map(_of_all, val)) if several else _of_all(val)


def _of_all(value: Any) -> Any:
    return without_data(value) if isinstance(value, torch.Tensor) else value


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
        if not hasattr(self.root, name):  # as a constant is, with its value
            value = torch.empty(variable.shape, dtype=variable.dtype, device="meta")
            if variable.is_parameter:
                value = nn.Parameter(value, variable.requires_grad)
            put_tensor(self.root, name, value, persistent=variable.persistent)
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
            item.meta.update(val=val, source=source_of(origin))
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
                f"trace: the model turns autocast on ({source_of(origin)}); remove it and ask for "
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
        call = (x, seed, probability, salt, "I")
        node = self.graph.create_node("call_function", seeded_dropout, call, name="dropout")
        node.meta.update(val=x.meta["val"], source=source_of(origin))
        return node

    def emit(
        self, origin: fx.Node, target: Any, args: Any, kwargs: Any = None, val: Any = None
    ) -> fx.Node:
        """Append a call that stands for (part of) `origin` and return it."""
        if not isinstance(target, torch._ops.OpOverload):
            raise TraceError(
                f"trace: the graph calls {target} ({source_of(origin)}), which is no ATen and no "
                "registered op; higher-order control flow (torch.cond, flex_attention) is not "
                "supported"
            )
        refuse_random(origin, target)
        val = origin.meta["val"] if val is None else val
        if isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool) or _is_ragged(val):
            raise TraceError(
                f"trace: the model reads a number out of a tensor ({source_of(origin)}) and goes "
                "on with it: what it computes depends on values, and a static graph cannot. "
                "Replace tensor.item(), tolist() and loops over them by torch.where or arithmetic; "
                "say of counts how many there are, with torch._check(counts.shape[0] == n)"
            )
        several = isinstance(val, (list, tuple)) and target.namespace != "aten"
        if several and len(tensors_of(val)) == len(val) > 0:
            val = tuple(val)
        elif not isinstance(val, torch.Tensor):
            raise TraceError(
                f"trace: the graph calls {target} ({source_of(origin)}), expected an op that "
                "returns one tensor; use ops that do, for example var and mean in place of var_mean"
            )
        name = target._schema.name.split("::")[1].strip("_")
        node = self.graph.create_node("call_function", target, args, kwargs or {}, name)
        node.meta["val"] = val
        node.meta["source"] = source_of(origin)
        return node


_ASSERTIONS = {
    *(aten._assert_scalar.default, aten._assert_async.msg, aten._assert_async.default),
    *(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default),
    *(aten._assert_tensor_metadata.default,),
}
_FAMILIES = LOWERINGS | SELECTIONS | REPEATS
# Higher-order ops around a sub-graph: (whether gradients flow through, index of the sub-graph).
_WRAPPERS = {"wrap_with_set_grad_enabled": (False, 1), "wrap_with_autocast": (True, 4)}


def _is_ragged(val: Any) -> bool:
    """Whether a tensor's shape depends on values.

    Counts that are added to a vector of 8 are 8: torch notes it where they are added.
    """
    return isinstance(val, torch.Tensor) and not all(map(is_concrete_int, val.shape))


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
