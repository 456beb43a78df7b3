"""What differs between two programs, node by node: what a pass did, or where two plans part.

Nodes are matched by structure, not by name: first those that make the same call on matched inputs,
wherever they stand, then, region by region, those of the same op and module in the same order. So a
call inserted in the middle shows as one added node and a changed argument of each that uses it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Any

from torch import fx

from ilm_compile.program.dump import target_name
from ilm_compile.program.layout import layout_of
from ilm_compile.program.program import Program
from ilm_compile.program.values import tensors_of

Pairs = dict[fx.Node, fx.Node]  # from a node of the second program to its match in the first


def diff(program_a: Program, program_b: Program) -> str:
    """Return a listing of the nodes removed from `a` (-), added in `b` (+) and changed (~).

    Changed means: other arguments, dtype, shape, placement, stage or region. Grouped by region, in
    the order of the graph; empty if nothing differs. The order of nodes that do not depend on each
    other is no difference.
    """
    pairs = _match(program_a, program_b)
    groups: dict[str, list[str]] = {_region(program_b, n): [] for n in program_b.graph.nodes}
    for line in _region_changes(program_a, program_b):
        groups.setdefault("regions", []).append(line)
    kept = set(pairs.values())
    for node in program_a.graph.nodes:
        if node not in kept:
            groups.setdefault(_region(program_a, node), []).append(f"- {_line(program_a, node)}")
    for node in program_b.graph.nodes:
        group = groups[_region(program_b, node)]
        if node not in pairs:
            group.append(f"+ {_line(program_b, node)}")
        elif changes := list(_changes(program_a, program_b, pairs, node)):
            group.append(f"~ {node.name}: {'; '.join(changes)}{_where(program_b, node)}")
    blocks = [f"@@ {name} @@\n" + "\n".join(lines) for name, lines in groups.items() if lines]
    if not blocks:
        return ""
    title = f"--- {_title(program_a)}\n+++ {_title(program_b)}\n"
    return title + "\n".join(blocks) + "\n"


def _match(program_a: Program, program_b: Program) -> Pairs:
    pairs: Pairs = {}
    same_call: dict[str, list[fx.Node]] = defaultdict(list)
    for node in program_a.graph.nodes:
        same_call[_call_key(node, {})].append(node)
    for node in program_b.graph.nodes:
        candidates = same_call[_call_key(node, pairs)]
        # of several equal calls, the one from the same module
        candidates.sort(key=lambda a: _path(program_a, a) != _path(program_b, node))
        if candidates and (node.op != "call_function" or _known(node, pairs)):
            pairs[node] = candidates.pop(0)
    kept = set(pairs.values())
    rest_a = [node for node in program_a.graph.nodes if node not in kept]
    rest_b = [node for node in program_b.graph.nodes if node not in pairs]
    keys_a, keys_b = (
        [(_region(p, n), n.op, target_name(n), _path(p, n)) for n in nodes]
        for p, nodes in ((program_a, rest_a), (program_b, rest_b))
    )
    alignment = SequenceMatcher(None, keys_a, keys_b, autojunk=False)
    for a, b, size in alignment.get_matching_blocks():
        pairs.update(zip(rest_b[b : b + size], rest_a[a : a + size], strict=True))
    return pairs


def _known(node: fx.Node, pairs: Pairs) -> bool:
    return all(source in pairs for source in node.all_input_nodes)


def _call_key(node: fx.Node, pairs: Pairs) -> str:
    """Return a text that two nodes share if they make the same call on matched inputs."""

    def identity(source: fx.Node) -> Any:
        return _Identity(pairs.get(source, source))

    args = fx.node.map_arg((node.args, node.kwargs), identity)
    return f"{node.op} {node.target if node.op != 'call_function' else target_name(node)} {args}"


class _Identity:
    """Stands for one node among arguments."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def __repr__(self) -> str:
        return f"<{id(self.node)}>"


def _changes(program_a: Program, program_b: Program, pairs: Pairs, node: fx.Node) -> Iterator[str]:
    old = pairs[node]
    if _call_key(old, {}) != _call_key(node, pairs):
        yield f"args {_arguments(old)} -> {_arguments(node)}"
    for what, of in _PROPERTIES.items():
        before, after = of(program_a, old), of(program_b, node)
        if before != after:
            yield f"{what} {before} -> {after}"


def _region_changes(program_a: Program, program_b: Program) -> Iterator[str]:
    before = {region.name: region.recompute for region in program_a.regions}
    for region in program_b.regions:
        if before.get(region.name, region.recompute) != region.recompute:
            yield f"~ {region.name}: recompute {not region.recompute} -> {region.recompute}"


def _value(node: fx.Node, attribute: str) -> Any:
    values = [getattr(value, attribute) for value in tensors_of(node.meta.get("val"))]
    return values[0] if len(values) == 1 else tuple(values) or None


def _region(program: Program, node: fx.Node) -> str:
    if node.op == "call_function":
        index: int = node.meta["region"]
        return program.regions[index].name
    return {"placeholder": "inputs", "get_attr": "variables"}.get(node.op, "outputs")


def _path(program: Program, node: fx.Node) -> str:
    return program.source(node).module_path


def _placement(program: Program, node: fx.Node) -> str:
    return layout_of(node).text(program.axis_names()) if "layout" in node.meta else ""


_PROPERTIES = {
    "dtype": lambda program, node: str(_value(node, "dtype")).removeprefix("torch."),
    "shape": lambda program, node: list(_value(node, "shape") or ()),
    "placement": lambda program, node: _placement(program, node) or "none",
    "stage": lambda program, node: "clone" if "clone" in node.meta else node.meta.get("stage"),
    "region": _region,
}


def _arguments(node: fx.Node) -> str:
    args = [repr(arg) for arg in node.args]
    args += [f"{key}={value!r}" for key, value in node.kwargs.items()]
    return f"({', '.join(args)})"


def _line(program: Program, node: fx.Node) -> str:
    dtype, shape = (_PROPERTIES[key](program, node) for key in ("dtype", "shape"))
    placement = f" {placed}" if (placed := _placement(program, node)) else ""
    called = f"{target_name(node)}{_arguments(node)}" if node.op == "call_function" else node.op
    return f'{node.name}: "{dtype}{shape}{placement}" = {called}{_where(program, node)}'


def _where(program: Program, node: fx.Node) -> str:
    path = _path(program, node)
    return f"  # {path}" if path else ""


def _title(program: Program) -> str:
    last = program.pass_log[-1].split(":")[0] if program.pass_log else "no pass"
    return f"{len(program.graph.nodes)} nodes, after {last}"
