"""The typed check refuses a program whose collectives are not what the rules ask for."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from ilm_compile.errors import PlacementError
from ilm_compile.models import internlm2_tiny
from ilm_compile.passes import ContextParallel, TensorParallel, run_passes
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.layout import Layout
from ilm_compile.program.placement import I, P, R, S
from ilm_compile.program.plan import Plan
from ilm_compile.program.trace import trace
from ilm_compile.sharding import check_placements
from tests.support.layouts import tp


def sharded(sequence_parallel=False):
    program = replace(trace(internlm2_tiny(num_layers=1)), plan=Plan(tp=2))
    run_passes(program, [TensorParallel(size=2, sequence_parallel=sequence_parallel)])
    return program


def collective(program, src, dst):
    return next(
        node
        for node in program.calls()
        if node.target is redistribute and (node.kwargs["src"], node.kwargs["dst"]) == (src, dst)
    )


def retype(node, dst):
    node.kwargs = {**node.kwargs, "dst": str(dst)}
    node.meta["layout"] = tp(dst)


def test_the_program_the_search_found_is_accepted():
    check_placements(sharded())


@pytest.mark.parametrize(("src", "dst"), [("P", "I"), ("I", "R")])
def test_a_dropped_collective_is_refused(src, dst):
    program = sharded()
    node = collective(program, src, dst)
    node.replace_all_uses_with(node.args[0])
    program.graph.erase_node(node)
    with pytest.raises(PlacementError, match="Is a collective missing"):
        check_placements(program)


def test_a_doubled_collective_is_refused():
    program = sharded()
    node = collective(program, "P", "I")
    with program.graph.inserting_after(node):
        twice = program.graph.node_copy(node)
    node.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    twice.args = (node,)
    with pytest.raises(PlacementError, match="typed P -> I, but the graph says I -> I"):
        check_placements(program)


@pytest.mark.parametrize(("src", "dst", "wrong"), [("P", "I", R), ("I", "R", I), ("P", "I", P)])
def test_a_retyped_collective_is_refused(src, dst, wrong):
    program = sharded()
    retype(collective(program, src, dst), wrong)
    with pytest.raises(PlacementError):
        check_placements(program)


def test_a_norm_weight_that_is_not_reduced_under_sequence_parallelism_is_refused():
    program = sharded(sequence_parallel=True)
    norm = next(n for n in program.calls() if "rms_norm" in n.name and n.args[2].kwargs)
    weight = norm.args[2]
    assert (weight.kwargs["src"], weight.kwargs["dst"]) == ("I", "R")
    norm.replace_input_with(weight, weight.args[0])
    with pytest.raises(PlacementError, match=re.escape("(S(1), I) does not give S(1)")):
        check_placements(program)


def test_a_partial_loss_is_refused():
    program = sharded()
    loss = program.graph.output_node().args[0][0]
    loss.meta["layout"] = tp(P)
    with pytest.raises(PlacementError):
        check_placements(program)


def test_a_wrong_shard_dimension_of_a_parameter_is_refused():
    program = sharded()
    node = next(n for n in program.graph.nodes if n.target == "layers.0.attention.wo.weight")
    node.meta["layout"] = program.variables[node.target].layout = tp(S(0))
    with pytest.raises(PlacementError, match="has global shape"):
        check_placements(program)


def over_two_axes():
    program = replace(trace(internlm2_tiny(num_layers=1)), plan=Plan(tp=2, cp=2))
    run_passes(program, [TensorParallel(size=2), ContextParallel(size=2, attention="heads")])
    return program


def test_each_axis_of_a_program_is_checked():
    check_placements(over_two_axes())


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_a_dropped_collective_of_any_axis_is_refused(axis):
    program = over_two_axes()
    node = next(n for n in program.calls() if n.kwargs.get("axis") == axis)
    node.replace_all_uses_with(node.args[0])
    program.graph.erase_node(node)
    with pytest.raises(PlacementError):
        check_placements(program)


@pytest.mark.parametrize("placement", [I, S(0), P], ids=str)
def test_a_parameter_whose_gradient_parts_would_not_be_added_up_is_refused(placement):
    program = over_two_axes()
    node = next(n for n in program.graph.nodes if n.target == "norm.weight")
    node.meta["layout"] = program.variables["norm.weight"].layout = Layout.of({"cp": placement})
    with pytest.raises(PlacementError, match=r"norm\.weight (to be R|has global shape)"):
        check_placements(program)


def test_an_exchange_of_heads_in_the_wrong_direction_is_refused():
    program = over_two_axes()
    node = next(n for n in program.calls() if "all_to_all" in n.name)
    node.kwargs = {**node.kwargs, "src": node.kwargs["dst"], "dst": node.kwargs["src"]}
    with pytest.raises(PlacementError, match="on axis cp, the collective is typed"):
        check_placements(program)


def by_queries():
    program = replace(trace(internlm2_tiny(num_layers=1)), plan=Plan(cp=2))
    run_passes(program, [TensorParallel(size=1), ContextParallel(size=2, attention="queries")])
    return program


def test_tokens_in_another_order_than_their_neighbours_are_refused():
    program = by_queries()
    node = collective(program, "I", "S(1, folded)")
    node.kwargs = {**node.kwargs, "dst": "S(1)"}
    node.meta["layout"] = Layout.of({"cp": S(1)})
    with pytest.raises(PlacementError, match=r"on axis cp, .* does not give S\(1, folded\)"):
        check_placements(program)


def test_attention_that_reads_its_place_as_other_than_it_lies_is_refused():
    program = by_queries()
    node = next(n for n in program.calls() if n.target is torch.ops.ilm.query_attention.default)
    node.args = (*node.args[:5], "S(1)", *node.args[6:])
    with pytest.raises(PlacementError, match=r"query_attention.*does not give S\(1, folded\)"):
        check_placements(program)
