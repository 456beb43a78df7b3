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
from ilm_compile.program.program import Source, Variable
from ilm_compile.program.repeats import REPEATS
from ilm_compile.program.selections import SELECTIONS

aten = torch.ops.aten
Lower = Callable[["_Normalizer", fx.Node, tuple[Any, ...], dict[str, Any]], Any]

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
        lower = _LOWERINGS.get(node.target)
        if lower is not None:
            return lower(self, node, args, kwargs)
        return self.emit(node, node.target, args, kwargs)

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
        return [self.emit(origin, aten.detach.default, (o,), {}, o.meta["val"]) for o in outputs]

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
        val = origin.meta["val"] if val is None else val
        if not isinstance(val, torch.Tensor):
            raise TraceError(
                f"trace: the graph calls {target} ({_source(origin)}), expected an op that returns "
                "one tensor; use ops that do, for example var and mean in place of var_mean"
            )
        name = target._schema.name.split("::")[1].strip("_")
        node = self.graph.create_node("call_function", target, args, kwargs or {}, name)
        node.meta["val"] = val
        node.meta["source"] = _source(origin)
        return node


_FAMILIES = SELECTIONS | REPEATS  # lowerings that stand in files of their own
# Higher-order ops around a sub-graph: (whether gradients flow through, index of the sub-graph).
_WRAPPERS = {"wrap_with_set_grad_enabled": (False, 1), "wrap_with_autocast": (True, 4)}


def _source(node: fx.Node) -> Source:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    frames = map(_FRAME.match, (node.meta.get("stack_trace") or "").splitlines())
    lines = [f"{f['file']}:{f['line']}" for f in frames if f and is_users_file(f["file"])]
    return Source(path.removeprefix("model").removeprefix("."), lines[-1] if lines else "")


def is_users_file(filename: str) -> bool:
    """Whether a stack frame in `filename` is the user's: not torch's, not of the capture."""
    return not filename.startswith(_NOT_THE_USERS)


def _input(run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]


def _nothing(run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return None


def _reshape(run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    sizes = list(node.meta["val"].shape)
    if sizes == list(args[0].meta["val"].shape):
        return args[0]
    return run.emit(node, aten.reshape.default, (args[0], sizes))


def _expand(run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    sizes = list(node.meta["val"].shape)
    if sizes == list(args[0].meta["val"].shape):
        return args[0]
    return run.emit(node, aten.expand.default, (args[0], sizes))


def _cast(run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dtype = node.meta["val"].dtype
    if args[0].meta["val"].dtype == dtype:
        return args[0]
    return run.emit(node, aten.to.dtype, (args[0], dtype))


def _copy(run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``y[:, 0] = x`` writes: x in the shape and dtype of its place; copy has no backward."""
    x, val = args[1], node.meta["val"]
    if x.meta["val"].dtype != val.dtype:
        cast = x.meta["val"].new_empty(x.meta["val"].shape, dtype=val.dtype)
        x = run.emit(node, aten.to.dtype, (x, val.dtype), val=cast)
    return _expand(run, node, (x,), {})


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


def _pieces(run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Split, chunk and unbind as slices and selects, one per piece."""
    x = args[0]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.meta["val"].dim()
    pieces, start = [], 0
    for val in node.meta["val"]:
        end = start + val.shape[dim]
        pieces.append(run.emit(node, aten.slice.Tensor, (x, dim, start, end), val=val))
        start = end
    return pieces


def _slice(run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.meta["val"].shape == args[0].meta["val"].shape and (len(args) < 5 or args[4] == 1):
        return args[0]
    return run.emit(node, node.target, args, kwargs)


def _transpose(
    run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    order = list(reversed(range(args[0].meta["val"].dim())))
    return run.emit(node, aten.permute.default, (args[0], order))


def _histc(run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Of integers it exists on CUDA only; the model was traced on neither device.
    val = node.meta["val"]
    if val.is_floating_point():
        return run.emit(node, node.target, args, kwargs)
    x = args[0].meta["val"]
    real = run.emit(node, aten.to.dtype, (args[0], torch.float32), val=x.float())
    counts = run.emit(node, node.target, (real, *args[1:]), kwargs, val.float())
    return run.emit(node, aten.to.dtype, (counts, val.dtype), val=val)


def _cat(run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Without the empty vectors that torch lets pass among tensors of any rank."""
    rank = node.meta["val"].dim()
    kept = [x for x in args[0] if x.meta["val"].dim() == rank]
    if len(kept) == 1:
        return kept[0]
    return run.emit(node, node.target, (kept, *args[1:]), kwargs)


def _broadcast(
    run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    expanded = []
    for x, val in zip(args[0], node.meta["val"], strict=True):
        same = x.meta["val"].shape == val.shape
        call = (x, list(val.shape))
        expanded.append(x if same else run.emit(node, aten.expand.default, call, val=val))
    return expanded


def _unbind(run: _Normalizer, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dim %= x.meta["val"].dim()
    return [
        run.emit(node, aten.select.int, (x, dim, index), val=val)
        for index, val in enumerate(node.meta["val"])
    ]


_RESHAPES = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int),
    *(aten.flatten.using_ints, aten.view_as.default, aten.reshape_as.default),
)
_EXPANDS = (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
_CASTS = (
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other),
    *(aten._to_copy.default, aten.type_as.default),
)
_SPLITS = (
    *(aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default),
)
_LOWERINGS: dict[Any, Lower] = {
    aten._assert_tensor_metadata.default: _nothing,
    aten.alias.default: _input,
    aten.lift_fresh_copy.default: _input,
    aten.copy.default: _copy,
    aten.dropout.default: _dropout,
    aten.scaled_dot_product_attention.default: _attention,
    aten.native_dropout.default: _native_dropout,
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_EXPANDS, _expand),
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_SPLITS, _pieces),
    aten.cat.default: _cat,
    aten.broadcast_tensors.default: _broadcast,
    aten.unbind.int: _unbind,
    aten.histc.default: _histc,
    aten.slice.Tensor: _slice,
    aten.numpy_T.default: _transpose,
}
